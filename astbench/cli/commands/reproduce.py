"""`astbench reproduce ROW`: runs the one command behind a row again, and says whether it comes out the same."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from astbench import console
from astbench.cli.messages import nearest
from astbench.cli.own_parser import OwnParser
from astbench.errors import AstbenchError, ConfigError, DataError
from astbench.runs.folder import RECORD
from astbench.tables.defaults import flatten
from astbench.tables.documents import Book
from astbench.tables.records import ITEMS, Run
from astbench.tables.repeat import LONG, repeat
from astbench.tables.verdict import verdict

_USAGE = """usage: astbench reproduce TABLE ROW [--option=value ...]
       astbench reproduce TABLE/RUN [--option=value ...]

Prints the command behind a row of a result table, runs it, and says whether what came is the record bit for bit, or
within its interval: of seeds where there are several, else of the items that were scored.

  TABLE ROW          a row by its number, as `astbench table TABLE` shows it
  TABLE/RUN          one record by its folder
  --option=value     laid over the command: your data (--data.path=FOLDER), your weights (--backbone.name=FOLDER)
  --print            print the commands and stop
  --run_dir FOLDER   where the run goes (default: runs/reproduced/TABLE/RUN)
  --results, --docs, --recipes FOLDER   as for `astbench table`

Exit codes: 0 reproduced, 1 not."""


def run(words: list[str]) -> int:
    """Repeat a row; 1 when one of its runs does not come out as on record."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given, options = _parse(words)
    book = Book(given.results, given.docs, given.recipes)
    runs = _runs(book, given.what)
    if given.run_dir is not None and len(runs) > 1:
        raise ConfigError(f"--run_dir is for one run, and this row has {len(runs)}; name one: {_name(runs[0])}")
    holds = True
    for one in runs:
        typed = _words(book, one, options)
        folder = given.run_dir or _free(Path("runs/reproduced") / one.group / one.name)
        console.say(f"# {_name(one)}\n{shlex.join(['astbench', *typed])}")
        if not given.print:
            holds &= _repeat(book, one, [*typed, f"--run_dir={folder}"], folder)
    return 0 if holds else 1


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OwnParser("reproduce")
    parser.add_argument("what", nargs="+", metavar="ROW")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--run_dir", type=Path)
    for option in ("results", "docs", "recipes"):
        parser.add_argument(f"--{option}", type=Path, default=Path(option))
    given, options = parser.parse_known_args(words)
    for option in options:
        if not option.startswith("--") or "=" not in option:
            raise ConfigError(f"astbench reproduce: {option} is neither a row nor an option; options: --option=value")
    return given, options


def _runs(book: Book, what: list[str]) -> list[Run]:
    """The runs of a row, or the one that is named."""
    if len(what) == 1 and "/" in what[0]:
        group, _, name = what[0].strip("/").rpartition("/")
        group = Path(group).name
        if group not in book.groups:
            raise ConfigError(f"unknown table '{group}'{nearest(group, list(book.groups))}")
        by_name = {run.name: run for run in book.groups[group].runs}
        if name not in by_name:
            raise ConfigError(f"{group} has no run '{name}'{nearest(name, list(by_name))}")
        return [by_name[name]]
    if len(what) != 2 or not what[1].isdecimal():
        raise ConfigError("astbench reproduce takes TABLE ROW, such as `demo 2`, or TABLE/RUN, such as demo/ast-0")
    if what[0] not in book.names():
        raise ConfigError(f"unknown table '{what[0]}'{nearest(what[0], book.names())}")
    rows = book.named(what[0])[0].rows
    if not 1 <= int(what[1]) <= len(rows):
        raise ConfigError(f"{what[0]} has rows 1 to {len(rows)}, got {what[1]}")
    found = rows[int(what[1]) - 1].runs
    if not found:
        raise ConfigError(f"row {what[1]} of {what[0]} is counted, not run; every record of the table holds it")
    return list(found)


def _name(run: Run) -> str:
    return f"{run.group}/{run.name}"


def _free(folder: Path) -> Path:
    """The folder, or one beside it that is not there."""
    number = 2
    found = folder
    while found.exists():
        found = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return found


def _words(book: Book, run: Run, options: list[str]) -> list[str]:
    """What to type after `astbench`.

    Raises:
        ConfigError: what only the recording machine had is not named.
    """
    again = repeat(run, book.read_recipes)
    given = {LONG.get(name, name) for option in options if (name := option.partition("=")[0].removeprefix("--"))}
    words = [
        *again.command.split(" ", 1),
        *([f"--config={book.recipes.parent / again.recipe}"] if again.recipe else []),
    ]
    for key, value in again.options.items():
        option = f"--{again.typed(key)}"
        if key in given:
            continue
        if isinstance(value, str) and value.startswith("/"):
            raise ConfigError(f"{_name(run)} was run with a folder of its own machine; name yours with {option}=FOLDER")
        words.append(f"{option}={value if isinstance(value, str) else json.dumps(value)}")
    evaluated = run.record.get("checkpoint") if again.command != "fit" else None
    if evaluated and "ckpt_path" not in given | again.options.keys():
        words.append(f"--ckpt_path={evaluated}")
    return [*words, *options]


def _repeat(book: Book, run: Run, words: list[str], folder: Path) -> bool:
    """Run it and hold it against the record; whether it holds."""
    if run.record["command"] in ("bench", "deploy-test"):
        raise ConfigError(
            f"{_name(run)} measures times, which belong to a machine; run the command above, and lay its table beside"
        )
    if folder.exists():
        raise ConfigError(f"--run_dir={folder} is there already; name another")
    for word in words:
        option, _, start = word.partition("=")
        if option == "--ckpt_path" and not Path(start).exists():
            raise ConfigError(
                f"{_name(run)} evaluates {start}, which is not here; name the run that trained it, --ckpt_path=FOLDER"
            )
        if option == "--init_from" and not Path(start).exists():
            raise ConfigError(
                f"{_name(run)} starts from the run {start}, which is not here; reproduce that one first, with "
                f"--run_dir={start}, or name it with --init_from=FOLDER"
            )
    done = subprocess.run([sys.executable, "-m", "astbench", *words])
    if done.returncode:
        raise _Failed(f"the command ended with {done.returncode}; nothing to compare", done.returncode)
    try:
        record, items = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RECORD, ITEMS))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no run to compare: {error}") from error
    seeds = _seeds(book, run)
    found = verdict(run, seeds, record, items)
    for line in found.lines():
        console.say(f"  {line}")
    return found.holds


def _seeds(book: Book, run: Run) -> list[Run]:
    """Runs on record that differ from this one by their seed alone, it among them."""

    def without_seed(one: Run) -> str:
        left = {**flatten(one.record["config"]), **one.entry.also, "seed_everything": None}
        return json.dumps(left, sort_keys=True, default=str)

    same = [one for one in book.groups[run.group].runs if without_seed(one) == without_seed(run)]
    by_seed = {int(one.record["seed"]): one for one in same}
    return [run] if len(by_seed) < 2 else list(by_seed.values())


class _Failed(AstbenchError):
    """The repeated command did not end well; its own message is above."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code if code > 0 else 1
