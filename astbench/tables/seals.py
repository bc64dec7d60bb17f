"""`SHA256SUMS` of a folder of results: no record changes, comes or goes unseen. `sha256sum -c` reads it, too.

What a `table.yaml` says is edited by hand, and shows on its page; so those files are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from astbench.errors import DataError
from astbench.files.text import read_text
from astbench.files.writing import sha256, write_text
from astbench.tables.records import SIDECAR

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def broken(results: Path) -> str | None:
    """The first file that is not as it was sealed; None where all are, or nothing is sealed.

    Raises:
        DataError: the list of digests cannot be read.
    """
    if not (results / SUMS).is_file():
        return None
    known = _read(results)
    for name, digest in known.items():
        file = results / name
        if not file.is_file():
            return f"{file} is gone, and {results / SUMS} holds its sha256"
        if sha256(file) != digest:
            return f"{file} was changed: its sha256 is not the one in {results / SUMS}"
    for name in _files(results):
        if name not in known:
            return f"{results / name} is not in {results / SUMS}; `astbench table --write` adds what is new"
    return None


def seal(results: Path) -> bool:
    """Add what is new to the list; whether something was.

    Raises:
        DataError: a file that was sealed is gone, or another now; its line must be taken out by hand first.
    """
    known = _read(results) if (results / SUMS).is_file() else {}
    for name, digest in known.items():
        if not (results / name).is_file() or sha256(results / name) != digest:
            raise DataError(
                f"{results / name} is not what was sealed; where that is meant, take its line out of {results / SUMS}"
            )
    new = [name for name in _files(results) if name not in known]
    known |= {name: sha256(results / name) for name in new}
    if new:
        write_text(results / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items())))
    return bool(new)


def sealed(results: Path) -> str:
    """Digest of the list itself, which the page of contents shows; empty where nothing is sealed."""
    return sha256(results / SUMS) if (results / SUMS).is_file() else ""


def _files(results: Path) -> Iterator[str]:
    for file in sorted(results.rglob("*")):
        name = file.relative_to(results).as_posix()
        if file.is_file() and file.name not in (SIDECAR, SUMS) and not file.name.startswith("."):
            yield name


def _read(results: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(results / SUMS).splitlines(), start=1):
        parts = _LINE.fullmatch(line)
        if parts is None or parts[2] in found or ".." in Path(parts[2]).parts or Path(parts[2]).is_absolute():
            raise DataError(
                f"{results / SUMS}:{number} is no line of a sha256, two blanks and a file's name, each once"
            )
        found[parts[2]] = parts[1]
    return found
