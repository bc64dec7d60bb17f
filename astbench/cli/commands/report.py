"""`astbench report`: records as one page of HTML to look through, sort and filter."""

from __future__ import annotations

import argparse
from pathlib import Path

from astbench import console
from astbench.cli.own_parser import OwnParser
from astbench.errors import ConfigError

_USAGE = """usage: astbench report [RUN ...] [--out FILE] [options]

One HTML file from records: a leaderboard to sort and filter, quality over density, time and memory over the length,
the tables, a page a run with its options and curves, and for analysed runs what each layer and head chose. It needs no
server and no network.

  RUN                folders of finished runs to show beside the records; one in which `astbench analyze` wrote
                     explorer.json has a page of its choices
  --out FILE         where it is written (default: report.html)
  --alone            show the given runs and no records
  --results FOLDER   records (default: results)
  --recipes FOLDER   recipes, from which the commands that repeat a run are made (default: recipes)
  --title TEXT       the page's title (default: astbench)"""


def run(words: list[str]) -> int:
    """Write the page."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    if given.alone and not given.runs:
        raise ConfigError("astbench report: --alone shows the given runs and nothing else; name one")
    if not given.alone and not given.results.is_dir():
        alone = "; --alone shows the given runs and needs none" if given.runs else ""
        raise ConfigError(f"--results={given.results} is not a folder of records{alone}")
    from astbench.files.writing import write_text
    from astbench.report.contents import contents
    from astbench.report.page import page
    from astbench.tables.documents import Book

    book = Book(given.results, Path("docs"), given.recipes)
    shown = contents(book, given.runs, alone=given.alone)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = page(shown, given.title)
    write_text(given.out, text)
    patterns = f", {len(shown['patterns'])} with what was chosen" if shown["patterns"] else ""
    runs, benches = len(shown["runs"]), len(shown["benches"])
    console.say(
        f"{given.out}: {runs} run{'s'[: runs != 1]}{patterns}, {benches} bench{'es'[: 2 * (benches != 1)]}, "
        f"{len(text.encode()) / 1e6:.1f} MB"
    )
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("report")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--title", default="astbench")
    for option in ("results", "recipes"):
        parser.add_argument(f"--{option}", type=Path, default=Path(option))
    return parser.parse_args(words)
