"""`astbench table` on the command line, and how wide its tables are."""

import subprocess
import sys
from pathlib import Path

import pytest

from astbench.cli import main
from astbench.tables.documents import Book
from astbench.tables.layout import cells

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("words", [["--help"], ["needle"], ["cost.memory", "demo.short"]])
def test_showing_needs_no_torch(words):
    code = (
        f"import sys; from astbench.cli import main; code = main(['table', *{words}]); print(sorted(sys.modules), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert modules.endswith(" 0") and "'torch'" not in modules and "'lightning'" not in modules


def test_shows_the_tables_of_its_names(capsys):
    assert main(["table", "needle", "cost.memory"]) == 0
    out = capsys.readouterr().out
    assert "  2  ast                           0.213         96.4" in out
    assert "Memory of one layer at 16,384 tokens" in out and "Time of one layer" not in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["needel"], "unknown table 'needel' (did you mean needle?); tables: ablations, cost, "),
        (["--write", "--check"], "astbench table: argument --check/--verify: not allowed with argument --write"),
        (["--chek"], "astbench table: unrecognized arguments: --chek"),
        (["--results", "nowhere", "demo"], "--results=nowhere is not a folder"),
    ],
)
def test_one_line_on_what_is_wrong(capsys, words, message):
    assert main(["table", *words]) in (2, 3)
    assert message in capsys.readouterr().err


def test_no_table_is_wider_than_eight_columns():
    book = Book(Path("results"), Path("docs"), Path("recipes"))
    names = [name for name in book.names() if name != "attentions"]
    tables = [table for name in names for table in book.named(name)]
    assert {len(cells(table, numbered=True)[0]) for table in tables} <= set(range(1, 9))
    for table in tables:
        assert all(len(row.cells) == len(table.head) for row in table.rows), table.name
