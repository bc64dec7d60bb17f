"""Lines for the reader of a terminal or a log. Imports nothing heavy."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """One line to standard output, at once."""
    print(line, flush=True)


def table(rows: dict[str, object], indent: str = "  ") -> None:
    """Names and values, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{indent}{name:<{width}}  {value}")


def interactive() -> bool:
    """Somebody is watching."""
    return sys.stdout.isatty()
