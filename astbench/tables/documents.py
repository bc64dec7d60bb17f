"""Where tables stand: pages of their own, and between markers in other documents. Written, or compared.

A marker is `<!-- NAME -->` on a line of its own; what follows up to `<!-- end -->` is the table of that name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from astbench.errors import DataError
from astbench.files.text import read_text
from astbench.files.writing import write_text
from astbench.tables.layout import Table
from astbench.tables.page import SHORT, block, index, page, tables_of
from astbench.tables.records import RECORD, Group, read_groups
from astbench.tables.repeat import Recipe, read_recipes
from astbench.tables.seals import SUMS, broken, seal, sealed

ATTENTIONS = "attentions"
"""The one table that comes from the registry, not from records; it has no page, only markers."""

INDEX = "README.md"
MADE = "<!-- Made from"
"""How a page begins that `--write` made."""
_MARKED = re.compile(r"^<!-- ([\w.-]+) -->\n(.*?)^<!-- end -->$", re.S | re.M)


@dataclass(frozen=True)
class Book:
    """The tables of a folder of records, and the documents that show them.

    Attributes:
        results: Folder of groups of records.
        docs: Folder of documents; pages are written to `results/` in it.
        recipes: Folder of recipes, for the commands that repeat rows.
    """

    results: Path
    docs: Path
    recipes: Path

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The groups of records, by name."""
        return read_groups(self.results)

    @cached_property
    def tables(self) -> dict[str, list[Table]]:
        """Name of a page -> its tables; groups whose records are all left out have none."""
        found = {name: tables_of(group, self.groups) for name, group in self.groups.items()}
        return {name: tables for name, tables in found.items() if tables}

    @cached_property
    def shorts(self) -> dict[str, Table]:
        """Short tables for a README, by name; they are on no page."""
        found = [SHORT[self.groups[name].kind](self.groups[name]) for name in self.tables if self.groups[name].short]
        return {table.name: table for table in found}

    @cached_property
    def read_recipes(self) -> list[Recipe]:
        """The recipes, read once."""
        return read_recipes(self.recipes)

    @property
    def pages(self) -> Path:
        """Where pages are written."""
        return self.docs / "results"

    def names(self) -> list[str]:
        """What `astbench table` takes: pages, parts of pages that have several tables, and the attentions."""
        parts = [table.name for tables in self.tables.values() for table in tables]
        return list(dict.fromkeys([*self.tables, *parts, *self.shorts, ATTENTIONS]))

    def named(self, name: str) -> list[Table]:
        """The tables of a name from :meth:`names`."""
        if name == ATTENTIONS:
            from astbench.tables.pages import attentions  # takes seconds, and torch

            return [attentions.table()]
        if name in self.shorts:
            return [self.shorts[name]]
        tables = self.tables[name.partition(".")[0]]
        return tables if name in self.tables else [table for table in tables if table.name == name]

    def documents(self, names: Collection[str] = ()) -> Iterator[tuple[Path, str]]:
        """Every file that shows tables and what should stand in it; with names, only those tables'."""
        wanted = {name.partition(".")[0] for name in names}
        for name, tables in self.tables.items():
            if not names or name in wanted:
                text = page(self.groups[name], self.groups, tables, self.read_recipes, self.pages)
                yield self.pages / f"{name}.md", text
        if not names:
            yield self.pages / INDEX, index(self.groups, sealed(self.results))
        for file in self._marked():
            yield file, self._filled(file, names)

    def strangers(self) -> list[Path]:
        """Pages of tables that are gone; what somebody wrote by hand is none."""
        known = {f"{name}.md" for name in self.tables} | {INDEX}
        others = [file for file in sorted(self.pages.glob("*.md")) if file.name not in known]
        return [file for file in others if read_text(file).startswith(MADE)]

    def _marked(self) -> list[Path]:
        others = [file for file in sorted(self.docs.rglob("*.md")) if self.pages not in file.parents]
        readme = self.docs.parent / "README.md"
        return [file for file in ([readme] if readme.is_file() else []) + others if _MARKED.search(read_text(file))]

    def _filled(self, file: Path, names: Collection[str]) -> str:
        known: Mapping[str, None] = dict.fromkeys(self.names())

        def fill(found: re.Match[str]) -> str:
            name = found[1]
            if name not in known:
                raise DataError(f"{file} has a marker for {name}, and no records make such a table")
            if names and name not in names:
                return found[0]
            return f"<!-- {name} -->\n{block(self.named(name))}<!-- end -->"

        return _MARKED.sub(fill, read_text(file))


def write(book: Book, names: Collection[str] = ()) -> tuple[list[Path], list[Path]]:
    """Write every document that differs, and remove pages of tables that are gone; returns both.

    Where records are sealed, new ones are, too.

    Raises:
        DataError: records, a `table.yaml` or a marker that cannot be, or a sealed record that was changed.
    """
    written = []
    if book.tables and not names and (book.results / SUMS).is_file() and seal(book.results):  # tables that can be
        written.append(book.results / SUMS)
    for file, text in list(book.documents(names)):
        if not file.is_file() or read_text(file) != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
            written.append(file)
    gone = [] if names else book.strangers()
    for file in gone:
        file.unlink()
    return written, gone


def first_difference(book: Book, names: Collection[str] = ()) -> str | None:
    """Where documents, records and each `table.yaml` first disagree; None where they agree."""
    try:
        if not names and (gone := book.strangers()):
            return f"{gone[0]} shows a table that no records make"
        for file, text in book.documents(names):
            if not file.is_file():
                return f"{file} is missing"
            if difference := _difference(read_text(file), text):
                return f"{file}, {difference}"
        return None if names else broken(book.results) or _unclean(book)
    except DataError as error:
        return str(error)


def _unclean(book: Book) -> str | None:
    """The first sealed record that no commit can make again."""
    for run in (run for group in book.groups.values() for run in group.runs if sealed(book.results)):
        git = run.record.get("git") or {}
        if git.get("dirty") is not False or not git.get("commit"):
            return f"{run.folder / RECORD}: it ran from a tree with changes that no commit holds"
    return None


def _difference(stands: str, wanted: str) -> str | None:
    if stands == wanted:
        return None
    lines = zip_longest(stands.splitlines(), wanted.splitlines(), fillvalue="(nothing)")
    for number, (old, new) in enumerate(lines, start=1):
        if old != new:
            return f"line {number}: it says {old[:160]!r}, the records say {new[:160]!r}"
    return "its line breaks differ"
