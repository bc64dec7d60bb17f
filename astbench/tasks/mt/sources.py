"""Readers of sentence pairs: parallel files, tables of pairs, the hub."""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from astbench.errors import DataError
from astbench.files.hub import hub_rows
from astbench.files.reading import as_text, one_line, read_bytes

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
    en, de = _lines(english), _lines(german)
    if len(en) != len(de):
        raise DataError(
            f"{english} has {len(en):,} lines and {german} has {len(de):,}; they must be parallel, line by line"
        )
    return [Pair(*pair) for pair in zip(en, de, strict=True)]


def _file(folder: Path, name: str, language: str, option: str) -> Path:
    tried = [folder / f"{name}.{ending}{packed}" for ending in ENDINGS[language] for packed in ("", ".gz")]
    for file in tried:
        if file.is_file():
            return file
    tables = sorted(x.name for x in folder.iterdir() if x.name.endswith((".tsv", ".tsv.gz", ".zip")) and x.is_file())
    table = f"; a table of pairs is read as --data.path={folder / tables[0]}" if tables else ""
    raise DataError(
        f"--data.path={folder} holds no {name}.{'|'.join(ENDINGS[language])} (also .gz); --data.{option} says what "
        f"its files are called{table}"
    )


def read_table(file: Path) -> list[Pair]:
    """A table of pairs: English, tab, German (what follows another tab is dropped); also `.gz`.

    A `.zip`, as manythings.org hands them out, must hold one such table beside its `_about.txt`.

    Raises:
        DataError: unreadable, or a line without a tab; names file and line.
    """
    pairs = []
    for number, line in enumerate(_lines(file), 1):
        if not line:
            continue
        columns = line.split("\t")
        if len(columns) < 2:
            raise DataError(f"{file}:{number} holds no tab between English and German: {line[:60]!r}")
        pairs.append(Pair(columns[0].strip(), columns[1].strip()))
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
    rows = hub_rows(name, configuration, split if limit is None else f"{split}[:{limit}]", revision)
    return [Pair(row["translation"]["en"].strip(), row["translation"]["de"].strip()) for row in rows]


def read_sentences(file: str | Path) -> list[str]:
    """The lines of a text file, for `predict`.

    Raises:
        DataError: missing, unreadable or without any text.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"--data.file={file} does not exist")
    lines = _lines(path)
    if not any(lines):
        raise DataError(f"--data.file={file} is empty")
    return lines


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Short digest of everything in the pairs, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\x1f".join([*pair, "\x1e"]).encode())
    return digest.hexdigest()[:16]


def _lines(file: Path) -> list[str]:
    """Lines without surrounding blanks; they end at newlines alone, since other separators stand in sentences."""
    text = as_text(_unzipped(file) if file.suffix == ".zip" else read_bytes(file), file, "utf-8-sig")
    lines = [line.strip() for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _unzipped(file: Path) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            tables = [name for name in archive.namelist() if not name.startswith("_") and not name.endswith("/")]
            if len(tables) != 1:
                raise DataError(
                    f"{file} must hold one table of pairs, found {len(tables)}; unpack it and name the file"
                )
            return archive.read(tables[0])
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} cannot be unpacked: {one_line(error)}") from error
