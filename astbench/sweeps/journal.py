"""`sweep.json`: what became of each cell, whatever its own folder keeps; one sweep writes it at a time."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError
from astbench.files.writing import sha256, write_json

JOURNAL, LOCK = "sweep.json", ".sweep.lock"


class Journal:
    """Entries by the name of their cell, written whole after every change."""

    def __init__(self, folder: Path, sweep: Path) -> None:
        self._file = folder / JOURNAL
        self._data: dict[str, Any] = {"schema": 1, "sweep": str(sweep), "sha256": sha256(sweep), "cells": {}}
        try:
            before = json.loads(self._file.read_text(encoding="utf-8"))
            self._data["cells"] = dict(before["cells"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"{self._file} cannot be read: {' '.join(str(error).split())[:200]}; "
                "remove it, the runs keep their own records"
            ) from error

    def entry(self, cell: str) -> dict[str, Any]:
        """What was last said of a cell; empty if nothing was."""
        found = self._data["cells"].get(cell)
        return dict(found) if isinstance(found, dict) else {}

    def failure(self, cell: str) -> str:
        """Why its last attempt failed; empty if it did not."""
        entry = self.entry(cell)
        return str(entry.get("error") or "it failed") if entry.get("state") == "failed" else ""

    def started(self, cell: str, words: list[str]) -> None:
        """A process was started for it."""
        attempts = int(self.entry(cell).get("attempts", 0)) + 1
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._enter(cell, {"state": "running", "attempts": attempts, "started": began, "argv": ["astbench", *words]})

    def ended(self, cell: str, state: str, code: int, seconds: float, error: str) -> None:
        """Its process is gone."""
        before = self.entry(cell)
        said = {"state": state, "exit_code": code, "seconds": round(seconds, 1)} | ({"error": error} if error else {})
        self._enter(cell, {key: value for key, value in before.items() if key != "error"} | said)

    def _enter(self, cell: str, entry: dict[str, Any]) -> None:
        self._data["cells"][cell] = entry
        write_json(self._file, self._data)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other sweep runs in this folder.

    Raises:
        ConfigError: one does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(
            f"folder: {folder} cannot be written ({error.strerror}); name another in the sweep"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another sweep runs in {folder}; wait for it, or give this one another folder"
            ) from error
        yield
