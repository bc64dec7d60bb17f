"""Reading files that may be gzipped. Imports nothing heavy."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO


def open_bytes(file: Path) -> IO[bytes]:
    """Open for reading, unpacking `.gz` on the way.

    A truncated or damaged gzip raises `EOFError` or `OSError` while reading.
    """
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def read_bytes(file: Path) -> bytes:
    """The whole content, unpacked."""
    with open_bytes(file) as source:
        return source.read()
