"""Reading files that may be gzipped, with one line on what is wrong with them. Imports nothing heavy."""

from __future__ import annotations

import gzip
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from astbench.errors import AstbenchError, DataError, Stopped, out_of_memory

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file may raise: no permission, no gzip, one that ends too soon, one with wrong bytes."""


def open_bytes(file: Path) -> IO[bytes]:
    """Open for reading, unpacking `.gz` on the way; reading may raise what UNREADABLE names."""
    kind = file.stat()
    if not stat.S_ISREG(kind.st_mode):
        raise OSError("it is no file")  # a pipe would be waited for, and a device has no end
    if file.suffix == ".gz" and not kind.st_size:
        raise EOFError("it holds no bytes")  # which gzip reads as an empty text
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def named_file(folder: Path, name: str, what: str) -> Path:
    """A file that another file names: it may not lead out of the folder, and must be one that the system takes.

    Args:
        folder: Where it must be.
        name: Below the folder.
        what: What it is and where it was named, for the message.

    Raises:
        DataError: no such file, or no such name: too long, holding NUL, a loop of links.
    """
    try:
        file = (folder / name).resolve()
        if file.is_relative_to(folder.resolve()) and file.is_file():
            return file
        reason = "does not exist"
    except (OSError, ValueError, RuntimeError) as error:  # pathlib raises the last of these for a loop
        reason = f"cannot be read: {one_line(error)}"
    raise DataError(f"{what} {ascii(str(folder / name))[1:-1][:300]} {reason}")


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


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, not too long."""
    return " ".join(str(error).split())[:160]
