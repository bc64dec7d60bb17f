"""Reading files that may be gzipped, with one line on what is wrong with them. Imports nothing heavy."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO

from astbench.errors import DataError

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file may raise: no permission, no gzip, one that ends too soon, one with wrong bytes."""


def open_bytes(file: Path) -> IO[bytes]:
    """Open for reading, unpacking `.gz` on the way; reading may raise what UNREADABLE names."""
    if file.suffix == ".gz" and file.is_file() and not file.stat().st_size:
        raise EOFError("it holds no bytes")  # which gzip reads as an empty text
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def read_bytes(file: Path) -> bytes:
    """The whole content, unpacked.

    Raises:
        DataError: see :func:`unreadable`.
    """
    try:
        with open_bytes(file) as source:
            return source.read()
    except UNREADABLE as error:
        raise unreadable(file, error) from error


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """The whole content, unpacked, as text.

    Raises:
        DataError: not readable, or no UTF-8; says which.
    """
    return as_text(read_bytes(file), file, encoding)


def as_text(data: bytes, file: Path, encoding: str = "utf-8") -> str:
    """Bytes of a file as text.

    Raises:
        DataError: no UTF-8; says at which byte.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {one_line(error)}") from error


def unreadable(place: Path | str, error: Exception) -> DataError:
    """What to raise for one of UNREADABLE; `place` is the file, or the file and a line."""
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return DataError(f"{place} cannot be unpacked, the gzip file is cut short or damaged: {one_line(error)}")
    return DataError(f"{place} cannot be read: {one_line(error)}")


def one_line(error: Exception) -> str:
    """An error's message without line breaks, not too long."""
    return " ".join(str(error).split())[:160]
