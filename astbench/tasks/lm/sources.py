"""Readers of running text: WikiText's own files, the hub's rows, generated articles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from os.path import exists, isfile  # of names that the system refuses pathlib's own raise
from typing import Literal

from astbench.errors import DataError
from astbench.files.hub import hub_rows
from astbench.files.paths import asked_path
from astbench.files.text import plain, read_text
from astbench.tasks.lm import demo

WikiText = Literal["wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1"]
"""The hub's names; `raw` texts have their rare words, the others `<unk>` in their place."""

HUB = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
"""Data set and revision on the Hugging Face hub."""

_FILES = {
    "train": ("wiki.train.raw", "wiki.train.tokens"),
    "validation": ("wiki.valid.raw", "wiki.valid.tokens"),
    "test": ("wiki.test.raw", "wiki.test.tokens"),
}

# An article's title stands alone between blank lines; sections have more signs (` = = Title = = `), and lines such
# as ` = Position ; GP = ` in a table's legend have no blank lines around them.
_TITLE = re.compile(r"(?:\A|^ *\n)( = (?!= ).*(?<! =) = )\n(?= *$)", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """A split.

    Attributes:
        text: All of it, as the original file holds it; line ends and the like as in `files.text`.
        name: What to call it in a signature.
        recalls: Characters (first, after the last) of what can be known only from far before; of `demo` alone.
    """

    text: str
    name: str
    recalls: tuple[tuple[int, int], ...] = ()


def read_local(path: str, split: str) -> Corpus:
    """A split from a folder with WikiText's files, or from one file, whatever its name.

    Raises:
        DataError: missing or unreadable; names the file, and what was looked for.
    """
    if not path:
        raise DataError("--data.source=local needs --data.path=FOLDER with wiki.test.raw")
    where = asked_path(path)
    if not exists(where):
        raise DataError(f"--data.path={str(where)[:200]} does not exist")
    if isfile(where):
        if split == "train":
            raise DataError(
                f"--data.path={where} is one file; training needs a folder with wiki.train.raw and wiki.valid.raw"
            )
        return Corpus(read_text(where), where.name)
    for name in _FILES[split]:
        for ending in ("", ".gz"):
            if isfile(file := where / f"{name}{ending}"):
                return Corpus(read_text(file), file.name)
    raise DataError(f"--data.path={where} holds none of {', '.join(_FILES[split])} (also .gz)")


def read_hub(dataset: WikiText, split: str) -> Corpus:
    """A split from the Hugging Face hub at a pinned revision; its offline cache is honoured.

    Raises:
        MissingPackageError: without the `datasets` package.
        DataError: the hub cannot be reached and nothing is cached.
    """
    name, revision = HUB
    rows = hub_rows(name, dataset, split, revision)
    return Corpus(plain(join_rows(rows["text"]), f"{dataset}/{split}"), f"{dataset}/{split}")


def join_rows(rows: list[str]) -> str:
    """The original file: the hub has a row a line, and left the space and the end out of blank ones."""
    return "".join(row or " \n" for row in rows)


def read_demo(split: str, num_articles: int) -> Corpus:
    """Generated articles."""
    made = demo.generate(split, num_articles)
    return Corpus(made.text, f"demo/{split}", made.recalls)


def articles(text: str) -> list[tuple[int, int]]:
    """(first character, the one after the last) of each article, title first; together they are the whole text.

    Text before the first title belongs to the first article; without any title all is one.
    """
    starts = [found.start(1) for found in _TITLE.finditer(text)]
    return list(pairwise([0, *starts[1:], len(text)]))
