"""Keeps `record.json` while a run goes on: from its first line to how it ended, over resumes too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from astbench.errors import Interrupted, NumericError, Terminated
from astbench.files.writing import write_json
from astbench.runs.folder import RECORD, RunFolder
from astbench.runs.record import new_record, peak_memory, read_record

_STATES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((NumericError,), "diverged"),
    ((Terminated,), "terminated"),
    ((Interrupted, KeyboardInterrupt), "interrupted"),
    ((torch.OutOfMemoryError, MemoryError), "out_of_memory"),
)
"""What ended a run, as its record calls it."""

_EARLIER = ("argv", "started", "state", "git", "versions", "hardware", "wall_seconds", "train")


class RunRecord:
    """The record of one process of a run.

    Attributes:
        data: What it holds so far.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.data: dict[str, Any] = {}
        self._folder = folder
        self._started = time.monotonic()
        self._train_before = 0.0
        self._before: dict[str, Any] | None = None
        self._is_writer = True

    def begin(
        self, command: str, config: dict[str, Any], words: Sequence[str], checkpoint: str | None, *, writer: bool
    ) -> None:
        """First version: should the process be killed, it says that it was running.

        Args:
            command: fit, validate, test or predict.
            config: All options.
            words: What was typed after the command.
            checkpoint: The one that the run starts from.
            writer: This process writes the record; of several, one does.
        """
        self.data = new_record(command, config, config["seed_everything"], words)
        self.data["checkpoint"] = checkpoint
        self._is_writer = writer
        self._before = read_record(self._folder / RECORD)
        if self._before is None:
            self.write()
            return
        # A resumed run's record names the processes before, and counts their time.
        earlier = {k: self._before[k] for k in _EARLIER if k in self._before}
        self.data["earlier"] = [*self._before.get("earlier", []), earlier]
        if "train" in self._before:
            self.data["train"] = self._before["train"]
            self._train_before = self._before["train"]["wall_seconds"]

    def write(self) -> None:
        """Write it as it is now, with the time taken and the peak memory."""
        if not self._is_writer:
            return
        self.data["wall_seconds"] = round(time.monotonic() - self._started, 3)
        self.data["peak_memory"] = peak_memory()
        write_json(self._folder / RECORD, self.data)

    def trained(self, steps: int) -> None:
        """Enter the steps, and the training time of all processes of the run up to now."""
        spent = self._train_before + time.monotonic() - self._started
        self.data["train"] = {"steps": steps, "wall_seconds": round(spent, 3)}
        self.write()

    def training_done(self, steps: int, timing: dict[str, Any]) -> None:
        """Enter the steps and their times; the training time stays that of the last checkpoint."""
        spent = self.data.get("train", {}).get("wall_seconds", self._train_before)
        self.data["train"] = {"steps": steps, "wall_seconds": spent, **timing}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write how it ended into the record, whatever happens."""
        try:
            yield
        except BaseException as error:
            self.data["state"] = next((state for kind, state in _STATES if isinstance(error, kind)), "failed")
            self.data["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if "parameters" in self.data:
                self.write()
            elif self._is_writer and self._before is not None:
                ended = {key: self.data[key] for key in ("state", "error")}
                write_json(self._folder / RECORD, {**self._before, **ended})
            elif self._is_writer:
                self._folder.discard()  # refused before anything ran: leave nothing behind
            raise
