"""Names of files from options and from data, among them names that the system refuses. Imports nothing heavy.

A name may be too long, hold a NUL or half of a surrogate pair, or run in a circle of links. `pathlib` raises OSError,
ValueError or RuntimeError for these; here, and for `os.path`, there is simply no such file.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from os.path import exists, isdir
from pathlib import Path

from astbench.errors import DataError

REFUSED = (OSError, ValueError, RuntimeError)
"""What looking for a file of an impossible name may raise."""


def asked_path(name: str | Path) -> Path:
    """The path that an option names, `~` filled in."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # the home of an unknown user
        return Path(name)


def other_kind(path: Path) -> str:
    """For a message on a path that should be the other of the two: `, it is a file`; empty where nothing is there."""
    return ", it is a folder" if isdir(path) else ", it is a file" if exists(path) else ""


def file_inside(folder: Path, name: str) -> Path | None:
    """The file of a name that stands in data: it may not lead out of the folder. None where there is none."""
    try:
        file = (folder / name).resolve()
        return file if file.is_relative_to(folder.resolve()) and file.is_file() else None
    except REFUSED:
        return None


def shown(name: object) -> str:
    """A name for a message: in quotes, without control characters, not too long."""
    text = str(name)
    return repr(text if len(text) <= 120 else f"{text[:120]}...")


def in_turns(folder: Path, names: tuple[str, ...], pattern: str) -> list[tuple[Path, int]]:
    """Files of a folder per class, sorted, with the class's number; one of each in turns: any first N are balanced.

    Raises:
        DataError: a class without files.
    """
    columns: list[list[tuple[Path, int]]] = []
    for label, name in enumerate(names):
        files = sorted((folder / name).glob(pattern))
        if not files:
            raise DataError(f"{folder / name} holds no {pattern}")
        columns.append([(file, label) for file in files])
    return [pick for pick in chain.from_iterable(zip_longest(*columns)) if pick is not None]
