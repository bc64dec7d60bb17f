"""Tables as plain data, and as aligned text, Markdown, CSV, LaTeX or HTML. Imports nothing heavy."""

from __future__ import annotations

import csv
import html
import io
import re
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


def csv_text(table: Table) -> str:
    """Comma-separated, by RFC 4180, the row's number first; backquotes gone."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(_plain(table))
    return out.getvalue()


def latex(table: Table) -> str:
    """A `table` of LaTeX with the rules of booktabs; the row's number first."""
    head, *rows = [[_tex(cell) for cell in line] for line in cells(table, numbered=True)]
    columns = "r" + "l" * table.words + "r" * (len(table.head) - table.words)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.caption)}}}", rf"\begin{{tabular}}{{{columns}}}"]
    lines += [r"\toprule", _tex_row(head), r"\midrule", *map(_tex_row, rows), r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", r"\end{table}"]) + "\n"


def html_text(table: Table) -> str:
    """A `table` element, its numbers to the right; backquotes become `code`."""
    head, *rows = cells(table, numbered=True)
    sides = ["right", *["left"] * table.words, *["right"] * (len(table.head) - table.words)]

    def line(tag: str, one: Sequence[str]) -> str:
        pairs = zip(one, sides, strict=True)
        made = [f'<{tag} style="text-align:{side}">{_html(cell)}</{tag}>' for cell, side in pairs]
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    caption = f"<caption>{_html(table.caption)}</caption>"
    return f"<table>\n{caption}\n<thead>\n{line('th', head)}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


def _plain(table: Table) -> list[list[str]]:
    return [[cell.replace("`", "") for cell in line] for line in cells(table, numbered=True)]


def _html(cell: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(cell, quote=False))


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$\dagger$", "<": "$<$",
    ">": "$>$", "±": r"$\pm$", "×": r"$\times$", "µ": r"$\mu$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _tex(cell: str) -> str:
    r"""Text for LaTeX; what stands in backquotes becomes \texttt."""
    parts = [re.sub(r"[\\~^†<>±×µ&%$#_{}]", lambda found: _TEX[found[0]], part) for part in cell.split("`")]
    return "".join(rf"\texttt{{{part}}}" if odd % 2 else part for odd, part in enumerate(parts))


def text(table: Table) -> str:
    """Aligned for a terminal, with the row's number; backquotes gone."""
    lines = _plain(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [_aligned(line, widths, table.words) for line in lines]
    return "\n".join([table.caption, *aligned]) + "\n"


def _aligned(line: Sequence[str], widths: Sequence[int], words: int) -> str:
    """Words to the left, numbers, and the row's own, to the right."""
    pairs = list(zip(line, widths, strict=True))
    parts = [cell.ljust(width) if 1 <= i <= words else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
    return "  ".join(parts).rstrip()


FORMATS = {"text": text, "markdown": markdown, "csv": csv_text, "latex": latex, "html": html_text}
"""`--format` of `astbench table` -> what makes it."""
