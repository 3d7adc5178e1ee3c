"""Users to be forgotten (input.forget): their rows reach no table, and their ids no manifest, log or Spark plan.

An id on the list is compared with user ids as this log types them: as integers, or as text without the spaces at its
ends, which the list cannot hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from ncf_dist.errors import InputError
from ncf_dist.inputs import ids_digest, listed_ids
from ncf_dist.prepare.chunks import Mask, as_mask
from ncf_dist.spark_io import map_in_arrow

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True)
class Forget:
    """The list, sent to the workers. ids: those on it, of the log's type. digest: of the list, None without one."""

    ids: pa.Array | None = field(default=None, repr=False)
    digest: str | None = None

    @classmethod
    def read(cls, path: str | None, user_id: pa.DataType) -> Forget:
        """Raises InputError where the list cannot be read, or an id on it is of no user that this log can have."""
        if path is None:
            return cls()
        listed = listed_ids(path)
        if user_id == pa.string():
            return cls(pa.array(listed, pa.string()), ids_digest(listed))
        numbers = [int(text) for text in listed if _INTEGER.fullmatch(text) and -(2**63) <= int(text) < 2**63]
        if len(numbers) < len(listed):
            # None of them is shown: what is to be forgotten must not live on in a log.
            raise InputError(
                f"input.forget: {len(listed) - len(numbers):,} of the {len(listed):,} ids in {path} are not integers "
                "of 64 bits, as this log's user ids are; needed one a line: fix the list, or set input.user_type"
            )
        return cls(pa.array(numbers, pa.int64()), ids_digest(listed))

    def among(self, ids: pa.Array) -> Mask:
        """(R,) which of these user ids, int64 or text, are to be forgotten. Null is nobody."""
        if self.ids is None or not len(self.ids):
            return np.zeros(len(ids), dtype=bool)
        if pa.types.is_string(ids.type):
            ids = pc.utf8_trim_whitespace(ids)
        return as_mask(pc.is_in(ids, value_set=self.ids, skip_nulls=True))

    def hides(self, ids: pa.Array) -> Mask:
        """(R,) which rejected rows must be kept without their text: those whose user id cannot be read, as the text may
        then name anybody. ids: (R,) their user ids."""
        if self.ids is None:
            return np.zeros(len(ids), dtype=bool)
        hidden = as_mask(pc.is_null(ids))
        if not pa.types.is_string(ids.type):
            return hidden
        blank = as_mask(pc.equal(pc.utf8_trim_whitespace(ids), ""))
        return hidden | blank | as_mask(pc.match_substring(ids, "\0"))

    def leave_out(self, frame: DataFrame, column: str) -> DataFrame:
        """`frame` without the rows of those users."""
        if self.ids is None:
            return frame

        def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                yield batch.filter(pa.array(~self.among(batch.column(column))))

        return map_in_arrow(frame, run, frame.schema)


NOBODY = Forget()
