"""`astbench table`: result tables from records, shown, written into documents, or compared with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from astbench import console
from astbench.cli.messages import nearest
from astbench.cli.own_parser import OwnParser
from astbench.errors import ConfigError

_USAGE = """usage: astbench table [NAME ...] [--write | --check] [options]

Result tables, computed from records (RESULTS/NAME/RUN/record.json) and nothing else.

  NAME               tables to show, write or check; default: all. `attentions` is counted from the registry
  --write            write the pages DOCS/results/NAME.md, and fill in what stands between <!-- NAME --> and
                     <!-- end --> in DOCS/../README.md and in the other documents of DOCS
  --check, --verify  compare instead; ends with 1 at the first line that the records do not say
  --format FORMAT    how they are shown: text, markdown, csv, latex (booktabs) or html (default: text)
  --results FOLDER   records (default: results)
  --docs FOLDER      documents (default: docs)
  --recipes FOLDER   recipes, from which the commands that repeat a row are made (default: recipes)

A table.yaml beside the runs of a NAME may say what was measured (title, scope, kind of table), which rows are stale,
and which records are left out; where it has a list of records, that names every one."""


def run(words: list[str]) -> int:
    """Show, write or compare; 1 when a document says something else than the records."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    from astbench.tables.documents import Book, first_difference, write
    from astbench.tables.layout import FORMATS

    book = Book(given.results, given.docs, given.recipes)
    for name in given.names:
        if name not in (known := book.names()):
            raise ConfigError(f"unknown table '{name}'{nearest(name, known)}; tables: {', '.join(known)}")
    if given.check:
        difference = first_difference(book, given.names)
        console.say(difference or f"{given.docs}: every table is what the records say")
        return 1 if difference else 0
    if given.write:
        written, gone = write(book, given.names)
        for file in written:
            console.say(f"{file}")
        for file in gone:
            console.say(f"{file}, of records that are gone: removed")
        return 0
    for name in given.names or [*book.tables, "attentions"]:
        for table in book.named(name):
            console.say(FORMATS[given.format](table))
        group = book.groups.get(name)
        for run, why in (group.left_out if group and given.format == "text" else {}).items():
            console.say(f"note: {name}/{run} stands in no row: {why}")
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("table")
    parser.add_argument("names", nargs="*", metavar="NAME")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", "--verify", action="store_true")
    parser.add_argument("--format", choices=("text", "markdown", "csv", "latex", "html"), default="text")
    for option in ("results", "docs", "recipes"):
        parser.add_argument(f"--{option}", type=Path, default=Path(option))
    return parser.parse_args(words)
