"""Readers of sentence pairs: parallel files, tables of pairs, the hub."""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from os.path import isdir, isfile  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import NamedTuple

from astbench.errors import DataError
from astbench.files import fields
from astbench.files.hub import hub_rows
from astbench.files.paths import asked_path, other_kind
from astbench.files.reading import one_line, unpacked
from astbench.files.text import lines, lines_of
from astbench.tasks.mt.doubts import refuse_ids, refuse_swapped

HUB = ("wmt/wmt14", "de-en", "b199e406369ec1b7634206d3ded5ba45de2fe696")
"""Data set, configuration and revision on the Hugging Face hub."""

HUB_TESTS = {"validation": "newstest2013", "test": "newstest2014"}
"""What the hub's evaluation splits are."""

ENDINGS = {"en": ("en", "eng"), "de": ("de", "deu")}
"""How files of a language end."""


class Pair(NamedTuple):
    """One sentence in both languages."""

    en: str
    de: str


def read_parallel(folder: Path, name: str, option: str) -> list[Pair]:
    """`NAME.en` and `NAME.de` (or .eng and .deu, also .gz) in a folder, line by line.

    Args:
        folder: Where they lie.
        name: What comes before the ending; may lead elsewhere.
        option: Which option set the name.

    Raises:
        DataError: missing, unreadable, or of different length; names the files.
    """
    english, german = (_file(folder, name, language, option) for language in ENDINGS)
    en, de = ([line.strip() for _, line in lines(file)] for file in (english, german))
    if len(en) != len(de):
        raise DataError(
            f"{english} has {len(en):,} lines and {german} has {len(de):,}; they must be parallel, line by line"
        )
    return [Pair(*pair) for pair in zip(en, de, strict=True)]


def _file(folder: Path, name: str, language: str, option: str) -> Path:
    tried = [folder / f"{name}.{ending}{packed}" for ending in ENDINGS[language] for packed in ("", ".gz")]
    for file in tried:
        if isfile(file):
            return file
    tables = sorted(x.name for x in folder.iterdir() if x.name.endswith((".tsv", ".tsv.gz", ".zip")) and x.is_file())
    table = f"; a table of pairs is read as --data.path={folder / tables[0]}" if tables else ""
    raise DataError(
        f"--data.path={folder} holds no {name}.{'|'.join(ENDINGS[language])} (also .gz); --data.{option} says what "
        f"its files are called{table}"
    )


def read_table(file: Path, columns: tuple[int, int] | None = None) -> list[Pair]:
    """A table of pairs, its columns parted by tabs; also `.gz`. Blank lines are none, blank cells are missing sides.

    A `.zip`, as manythings.org hands them out, must hold one such table beside its `_about.txt`.

    Args:
        file: The table.
        columns: Which columns hold English and German, counted from 1. If not given, they are the first two, and must
            look like it.

    Raises:
        DataError: unreadable, too few columns, columns of ids, or languages that look swapped; names file and line.
    """
    pairs, taken = [], columns or (1, 2)
    for number, line in _zipped_lines(file) if file.suffix == ".zip" else lines(file):
        if not line.strip():
            continue
        # A cell may be blank: so it is cut before it is stripped.
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) < 2:
            raise DataError(f"{file}:{number} holds no tab between English and German: {line[:60]!r}")
        if len(cells) < max(taken):
            raise DataError(
                f"{file}:{number} has {len(cells)} columns; --data.columns={taken[0]},{taken[1]} needs {max(taken)}"
            )
        pairs.append(Pair(*(cells[column - 1] for column in taken)))
        if len(pairs) == 1:
            first = cells
    if pairs and columns is None:
        refuse_ids(file, pairs, first)
        refuse_swapped(file, pairs)
    return pairs


def split_of(pair: Pair, holdout: int) -> str:
    """The split of a pair in one table: one English sentence in `holdout` is for each evaluation, whatever its line.

    By the English sentence, since tables of pairs give several translations of one.
    """
    return {0: "test", 1: "validation"}.get(zlib.crc32(pair.en.encode()) % holdout, "train")


def read_hub(split: str, limit: int | None) -> list[Pair]:
    """A split from the Hugging Face hub at a pinned revision; its offline cache is honoured.

    Raises:
        MissingPackageError: without the `datasets` package.
        DataError: the hub cannot be reached and nothing is cached.
    """
    name, configuration, revision = HUB
    pairs = []
    rows = hub_rows(name, configuration, split if limit is None else f"{split}[:{limit}]", revision)
    for number, row in enumerate(rows, 1):
        where = f"{name}/{split}: row {number}"
        both = fields.mapping(row, "translation", where)
        pairs.append(Pair(*(fields.text(both, language, where).strip() for language in ("en", "de"))))
    return pairs


def read_sentences(file: str | Path) -> list[str]:
    """The lines of a text file, for `predict`.

    Raises:
        DataError: missing, unreadable or without any text.
    """
    path = asked_path(file)
    if isdir(path):
        raise DataError(f"--data.file={file} is not a file{other_kind(path)}")
    if not isfile(path):
        raise DataError(f"--data.file={str(file)[:200]} does not exist")
    found = [line.strip() for _, line in (_zipped_lines(path) if path.suffix == ".zip" else lines(path))]
    if not any(found):
        raise DataError(f"--data.file={file} is empty")
    return found


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Short digest of everything in the pairs, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\x1f".join([*pair, "\x1e"]).encode())
    return digest.hexdigest()[:16]


def _zipped_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of the one table in a zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            tables = [name for name in archive.namelist() if not name.startswith("_") and not name.endswith("/")]
            if len(tables) != 1:
                raise DataError(
                    f"{file} must hold one table of pairs, found {len(tables)}; unpack it and name the file"
                )
            yield from lines_of(unpacked(archive.open(tables[0]), file), file)
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} cannot be unpacked: {one_line(error)}") from error
