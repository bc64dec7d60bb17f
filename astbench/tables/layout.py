"""Tables as plain data, and as Markdown or aligned text. Imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from astbench.tables.records import Run


@dataclass(frozen=True)
class Row:
    """Cells, and the runs that they were computed from."""

    cells: tuple[str, ...]
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table of a page.

    Attributes:
        name: What `astbench table NAME` and a marker in a document call it.
        caption: One line above it.
        head: Column heads, units included.
        words: How many columns, from the left, are words; the rest are numbers.
        rows: In the order shown.
    """

    name: str
    caption: str
    head: tuple[str, ...]
    words: int
    rows: tuple[Row, ...]

    def part(self) -> str:
        """What of the page it is: `forward` of `cost-forward`; the whole name of a page with one table."""
        return self.name.rpartition(".")[2]


def stale_runs(row: Row, table: Table) -> list[Run]:
    """The row's runs whose dagger is for this table."""
    label = row.cells[0].strip("`")
    return [
        run
        for run in row.runs
        if run.entry.stale
        and (not run.entry.stale_in or table.part() in run.entry.stale_in)
        and (not run.entry.stale_rows or label in run.entry.stale_rows)
    ]


def cells(table: Table, numbered: bool) -> list[list[str]]:
    """Head and rows; a stale row's label has a dagger and its date, a numbered one its number before it."""
    lines = [[*(["row"] if numbered else []), *table.head]]
    for number, row in enumerate(table.rows, start=1):
        label, *others = row.cells
        if stale := stale_runs(row, table):
            label += f" † {', '.join(dict.fromkeys(run.date for run in stale))}"
        lines.append([*([str(number)] if numbered else []), label, *others])
    return lines


def markdown(table: Table, numbered: bool = False) -> str:
    """As Markdown, ended by a line break."""
    head, *rows = cells(table, numbered)
    words = table.words
    rule = [*(["---:"] if numbered else []), *["---"] * words, *["---:"] * (len(table.head) - words)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *rows])


def text(table: Table) -> str:
    """Aligned for a terminal, with the row's number; backquotes gone."""
    lines = [[cell.replace("`", "") for cell in line] for line in cells(table, numbered=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [_aligned(line, widths, table.words) for line in lines]
    return "\n".join([table.caption, *aligned]) + "\n"


def _aligned(line: Sequence[str], widths: Sequence[int], words: int) -> str:
    """Words to the left, numbers, and the row's own, to the right."""
    pairs = list(zip(line, widths, strict=True))
    parts = [cell.ljust(width) if 1 <= i <= words else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
    return "  ".join(parts).rstrip()
