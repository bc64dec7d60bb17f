"""Tables in every format say the same."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from astbench.tables.documents import Book
from astbench.tables.layout import FORMATS, Row, Table, cells

ROOT = Path(__file__).parents[3]
ODD = Table(
    "odd",
    "100% of _x_ & more",
    ("a & b", "n, %"),
    1,
    (Row((r"`a_b` \ {x} # $ ~ ^", "1 < 2")), Row(("plain, “quoted”", '3 > "4"'))),
)


@pytest.fixture(scope="module")
def tables():
    book = Book(ROOT / "results", ROOT / "docs", ROOT / "recipes")
    return [ODD, *(table for found in book.tables.values() for table in found)]


class Cells(HTMLParser):
    """The cells of a table, row by row."""

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


def plain(table):
    return [[cell.replace("`", "") for cell in line] for line in cells(table, numbered=True)]


def test_csv_and_html_hold_the_cells(tables):
    for table in tables:
        assert list(csv.reader(io.StringIO(FORMATS["csv"](table)))) == plain(table)
        page = Cells()
        page.feed(FORMATS["html"](table))
        assert page.rows == plain(table) and page.open == []


def test_latex_is_escaped(tables):
    """Nothing is left that LaTeX would read as a command, but what this module writes."""
    ours = re.compile(r"\\(text(?:tt|backslash|asciitilde|asciicircum)|pm|times|dagger|mu|[&%$#_{}])")
    for table in tables:
        lines = FORMATS["latex"](table).splitlines()
        body = lines[lines.index(r"\toprule") + 1 : lines.index(r"\bottomrule")]
        rows = [line for line in body if line != r"\midrule"]
        assert len(rows) == len(table.rows) + 1
        for row in rows:
            assert row.endswith(r" \\")
            bare = row.removesuffix(r" \\")
            assert len(re.findall(r"(?<!\\)&", bare)) == len(table.head)
            left = ours.sub("", bare)
            assert "\\" not in left and not re.search(r"[%#_~^]", left), row
            assert left.count("{") == left.count("}") and left.count("$") % 2 == 0
            assert left.isascii() or not re.search("[†±×µ]", left)


def test_latex_of_odd_cells():
    text = FORMATS["latex"](ODD)
    assert r"\caption{100\% of \_x\_ \& more}" in text and r"\begin{tabular}{rlr}" in text
    assert r"1 & \texttt{a\_b} \textbackslash{} \{x\} \# \$ \textasciitilde{} \textasciicircum{} & 1 $<$ 2 \\" in text


def test_on_the_command_line(astbench, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert astbench("table", "demo.short", "--format=csv").out.startswith("row,attention,")
    refused = astbench("table", "demo.short", "--format=pdf")
    assert refused.code == 2 and "invalid choice: 'pdf'" in refused.err
