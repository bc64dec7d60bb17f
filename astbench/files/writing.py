"""Files that are either whole or not there, whatever kills the process. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"
"""How the name of a file that is being written ends; a kill may leave one behind."""


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> str:
    """Write a file so that a reader sees the old one or the whole new one; return its sha256.

    The temporary file lies in the same folder: a rename across filesystems is a copy, and a copy can be cut.

    Raises:
        OSError: disk full, no permission; the old file is untouched.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest


def write_text(path: str | Path, text: str) -> str:
    """Atomic UTF-8 text file; returns its sha256."""
    return write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, data: Any) -> str:
    """Atomic JSON file, keys in the order given; NaN and infinities become null."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair, of a name that is no Unicode, becomes an escape, which JSON knows too.
    return write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
