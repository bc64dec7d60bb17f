"""Bytes of files, unpacked on the way: one line on what is wrong, and no more than there is room for.

Imports nothing heavy.
"""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from astbench.errors import AstbenchError, DataError, Stopped, out_of_memory

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file may raise: no permission, no gzip, one that ends too soon, one with wrong bytes."""

MOST_BYTES = 4 << 30
"""Most bytes of a file that is read whole; WikiText-103 has half a gigabyte."""

MOST_TIMES = 100
"""A packed file may unpack to so many times its size; text gets to 3 to 10 times, repeated lines to 30."""

SMALL_BYTES = 8 << 20
"""Up to here a packed file may unpack to any number of times its size."""


def open_bytes(file: Path) -> IO[bytes]:
    """Open for reading, unpacking `.gz` on the way.

    Reading may raise what UNREADABLE names, and a DataError; see :func:`unpacked`.
    """
    kind = file.stat()
    if not stat.S_ISREG(kind.st_mode):
        raise OSError("it is no file")  # a pipe would be waited for, and a device has no end
    if file.suffix != ".gz":
        return file.open("rb")
    if not kind.st_size:
        raise EOFError("it holds no bytes")  # which gzip reads as an empty text
    return unpacked(cast(IO[bytes], gzip.open(file)), file)


@contextmanager
def read_by_library(what: str) -> Iterator[None]:
    """Within, a library reads a file that may hold anything, and raises what it likes: Rust's tokenizers even panic.

    Args:
        what: Which file, and what is wrong with it, for the message.

    Raises:
        DataError: in place of anything but a signal, our own errors, a package or memory that is missing.
    """
    try:
        yield
    except (AstbenchError, Stopped, KeyboardInterrupt, ImportError):
        raise
    except BaseException as error:
        if out_of_memory(error):
            raise
        raise DataError(f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error


def unpacked(source: IO[bytes], file: Path) -> IO[bytes]:
    """The content of a packed file, which raises a DataError once it is far more than text can be packed into."""
    return io.BufferedReader(_Unpacked(source, file))


def check_unpacked(file: Path, count: int) -> None:
    """Refuse a packed file of which so many bytes were unpacked.

    Raises:
        DataError: they are far more than its size.
    """
    if count > SMALL_BYTES and count > MOST_TIMES * file.stat().st_size:
        raise DataError(
            f"{file} unpacks to more than {MOST_TIMES} times its size, as no text does; if it is meant, unpack it "
            "yourself"
        )


class _Unpacked(io.RawIOBase):
    """Counts what comes out of a packed file: a megabyte of it can hold a gigabyte of blanks."""

    def __init__(self, source: IO[bytes], file: Path) -> None:
        self.source, self.file, self.count = source, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self.source.read(len(buffer))
        self.count += len(part)
        check_unpacked(self.file, self.count)
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.source.close()
        super().close()


def read_bytes(file: Path, most: int = MOST_BYTES, place: str = "") -> bytes:
    """The whole content, unpacked.

    Args:
        file: Where it is.
        most: Refuse more bytes than these.
        place: What to call the file in messages; its path if not given.

    Raises:
        DataError: see :func:`unreadable`; or too large.
    """
    place = place or str(file)
    try:
        with open_bytes(file) as source:
            return _all_of(source, place, most)
    except UNREADABLE as error:
        raise unreadable(place, error) from error


def _all_of(source: IO[bytes], place: str, most: int) -> bytes:
    parts, count = [], 0
    while part := source.read(1 << 20):
        count += len(part)
        if count > most:
            raise DataError(f"{place} holds more than {most:,} bytes, which is the limit here; take a part of it")
        parts.append(part)
    return b"".join(parts)


def unreadable(place: Path | str, error: Exception, where: str = "") -> DataError:
    """What to raise for one of UNREADABLE; `place` is the file, `where` comes last."""
    what = "cannot be read"
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        what = (
            f"cannot be unpacked, the {'zip' if str(place).endswith('.zip') else 'gzip'} file is cut short or damaged"
        )
    return DataError(f"{place} {what}: {one_line(error)}{where}")


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, not too long."""
    return " ".join(str(error).split())[:160]
