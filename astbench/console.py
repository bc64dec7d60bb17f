"""Lines for the reader of a terminal or a log. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def open_streams() -> None:
    """Give the process the standard streams that it was started without, and let none fail on a character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, and no later file may
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the end)
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """One line to standard output, at once; a run goes on without a reader."""
    try:
        print(line, flush=True)
    except OSError as error:
        drop(sys.stdout)
        tell(f"astbench: note: standard output cannot be written ({error.strerror}): going on without it")


def tell(line: str) -> None:
    """One line to standard error, if there is anybody."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Let a stream that cannot be written go nowhere: what it still holds would fail again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def table(rows: dict[str, object], indent: str = "  ") -> None:
    """Names and values, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{indent}{name:<{width}}  {value}")


def interactive() -> bool:
    """Somebody is watching."""
    return sys.stdout.isatty()
