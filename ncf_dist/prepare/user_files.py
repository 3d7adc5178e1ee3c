"""Tables ordered by user as a task of the pass over users writes them: each row in the file that its user decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist.sampling import IntArray
from ncf_dist.spark_files import ROWS_PER_FILE, FileSink

ORDER_BUCKETS = 4096
"""Rows in hashed order are counted by the top bits of their hash, to cut them into equal files."""


class UserSink(FileSink):
    """A sink of rows that ascend in user_idx."""

    def __init__(self, folder: str, schema: pa.Schema, users_per_file: int, rows_per_file: int = ROWS_PER_FILE) -> None:
        super().__init__(folder, schema, rows_per_file)
        self.users_per_file = users_per_file

    def add_rows(self, user: IntArray, columns: dict[str, Any]) -> None:
        """user: (R,) of each row; columns: (R,) arrays, NumPy or Arrow, in the order of the schema."""
        table = pa.table(
            [pa.array(c).cast(f.type) for c, f in zip(columns.values(), self.schema, strict=True)],
            schema=self.schema,
        )
        file = user // self.users_per_file
        for number in np.unique(file):
            start, end = np.searchsorted(file, [number, number + 1])
            self.add(int(number), table.slice(int(start), int(end - start)))


class StagingSink(UserSink):
    """Rows on their way to a table in hashed order (layout.py), with the column `order_hash`."""

    def __init__(self, folder: str, schema: pa.Schema, users_per_file: int, rows_per_file: int = ROWS_PER_FILE) -> None:
        super().__init__(folder, schema, users_per_file, rows_per_file)
        self.buckets: IntArray = np.zeros(ORDER_BUCKETS, dtype=np.int64)
        """(ORDER_BUCKETS,) how many rows so far each bucket of the order has."""

    def add_rows(self, user: IntArray, columns: dict[str, Any]) -> None:
        self.buckets += np.bincount(order_bucket(columns["order_hash"]), minlength=ORDER_BUCKETS)
        super().add_rows(user, columns)


def order_bucket(order: Any) -> Any:
    """Bucket of an order hash: ascending with the (signed) hash, equal width."""
    return (order >> 52) + ORDER_BUCKETS // 2


def lists(values: npt.NDArray[np.integer[Any]], offsets: IntArray, kind: pa.DataType | None = None) -> pa.Array:
    """(U,) lists of int32, or of another kind. values: (V,); offsets: (U+1,) where each list begins."""
    kind = kind or pa.int32()
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values.astype(kind.to_pandas_dtype())))


def offsets_of(row: IntArray, users: int) -> IntArray:
    """(U+1,) where the rows of each user begin. row: (R,) position of each row's user, ascending."""
    return np.concatenate([[0], np.cumsum(np.bincount(row, minlength=users))]).astype(np.int64)
