"""Text files as streams of UTF-8 or Latin-1 lines that end in a line feed, however they were written.

Compressed files are decompressed. Files with a byte-order mark of UTF-16 or UTF-32 are converted to UTF-8, and a place
in them is one in the UTF-8. In files without line feeds, carriage returns become line feeds.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa

from ncf_dist.errors import InputError
from ncf_dist.files import open_read
from ncf_dist.prepare.formats import compression

BOM = b"\xef\xbb\xbf"
HEADER_LIMIT = 2**20
SNIFFED = 2**16
_WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
"""UTF-32 first: its little-endian mark begins with that of UTF-16."""

Written = Literal["plain", "cr", "utf-16", "utf-32"]


def written(head: bytes) -> Written:
    """How a file is written, by its first bytes."""
    for mark, charset in _WIDE.items():
        if head.startswith(mark):
            return cast(Written, charset)
    return "cr" if b"\r" in head.rstrip(b"\r") and b"\n" not in head else "plain"


def wide(how: Written) -> bool:
    """Whether a character takes two bytes or four: then the stream is converted, and cannot start inside the file."""
    return how not in ("plain", "cr")


@contextlib.contextmanager
def opened(path: str, how: Written = "plain") -> Iterator[BinaryIO]:
    """The bytes of a text file. `seek` works for files that are neither compressed nor wide."""
    packed = compression(path)
    with open_read(path) as raw:
        stream = pa.CompressedInputStream(raw, packed) if packed else raw
        yield {"plain": lambda s: s, "cr": _Returns}.get(how, lambda s: _Wide(s, how))(stream)


def head(path: str, size: int = SNIFFED) -> tuple[bytes, Written]:
    """The first bytes of a text file, as its stream gives them, and how it is written. Raises InputError."""
    try:
        with opened(path) as stream:
            data = bytes(stream.read(size))
        how = written(data[:SNIFFED])
        if how != "plain":
            with opened(path, how) as stream:
                data = bytes(stream.read(size))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read ({error}); fix the file or its name's ending") from None
    return data.removeprefix(BOM), how


class _Returns:
    """Carriage returns as line feeds: places in the stream are places in the file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        return bytes(self._stream.read(size)).replace(b"\r", b"\n")

    def seek(self, place: int) -> int:
        return int(self._stream.seek(place))


def _as_half_pair(error: UnicodeError) -> tuple[str, int]:
    """For a decoder: half a surrogate pair for what is no character, and where to go on after it."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("ncf.half-pair", _as_half_pair)


class _Wide:
    """UTF-16 or UTF-32 as UTF-8. Text that is invalid stays invalid, so that its lines go to the quarantine, and they
    alone: what is no character becomes half a surrogate pair, which is none in UTF-8 either."""

    def __init__(self, stream: Any, charset: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(charset)("ncf.half-pair")
        self._ended = False

    def read(self, size: int) -> bytes:
        text = b""
        while not text and not self._ended:
            data = bytes(self._stream.read(size))
            text = self._decoder.decode(data).encode("utf-8", "surrogatepass")
            if not data:
                self._ended = True
                if self._decoder.getstate()[0]:
                    text += b"\xff"
        return text
