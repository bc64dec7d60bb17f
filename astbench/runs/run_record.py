"""Keeps `record.json` while a run goes on: from its first line to how it ended, over resumes too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from astbench import console
from astbench.errors import CheckpointError, Interrupted, NumericError, Terminated, out_of_memory
from astbench.files.writing import sha256, write_json
from astbench.runs.folder import CONFIG, RECORD, RunFolder
from astbench.runs.record import new_record, peak_memory, read_record

_STATES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((NumericError,), "diverged"),
    ((Terminated,), "terminated"),
    ((Interrupted, KeyboardInterrupt), "interrupted"),
)
"""What ended a run, as its record calls it."""

_EARLIER = ("argv", "started", "state", "git", "versions", "hardware", "wall_seconds", "train")


def config_doubts(folder: RunFolder) -> str:
    """What a user should know of a run's config before it goes on; empty if it is the one that the run began with.

    Raises:
        CheckpointError: it was edited.
    """
    known = (read_record(folder / RECORD) or {}).get("config_sha256")
    if known is None:
        return f"{folder / CONFIG} is unverified: {folder / RECORD} holds no sha256 of it"
    if known != sha256(folder / CONFIG):
        raise CheckpointError(
            f"{folder / CONFIG} is not the one that this run began with, its sha256 is another: --resume goes on as it "
            f"was configured; to change options start a new run, from its weights with --init_from={folder.path}"
        )
    return ""


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
        self,
        command: str,
        config: dict[str, Any],
        words: Sequence[str],
        checkpoint: str | None,
        *,
        writer: bool,
        plugins: Sequence[dict[str, str]] = (),
    ) -> None:
        """First version: should the process be killed, it says that it was running.

        Args:
            command: fit, validate, test or predict.
            config: All options.
            words: What was typed after the command.
            checkpoint: The one that the run starts from.
            writer: This process writes the record; of several, one does.
            plugins: Code that is not astbench's own, with what tells one version of it from another.
        """
        self.data = new_record(command, config, config["seed_everything"], words)
        self.data["checkpoint"] = checkpoint
        self.data["plugins"] = list(plugins)
        if (self._folder / CONFIG).is_file():
            self.data["config_sha256"] = sha256(self._folder / CONFIG)
        self._is_writer = writer
        self._before = read_record(self._folder / RECORD)
        if self._before is None:
            self.write()
            return
        self._go_on(self._before)
        if "flops" in self._before:
            self.data["flops"] = self._before["flops"]
        if "train" in self._before:
            self.data["train"] = self._before["train"]
            self._train_before = self._before["train"]["wall_seconds"]

    def _go_on(self, before: dict[str, Any]) -> None:
        """A resumed run is the one that was begun: its record says how that was, and what has gone on with it.

        The processes before this one stand under `earlier`, with their time; each but the first under `resumed`.
        """
        own = {key: self.data[key] for key in ("argv", "started")} | {"threads": self.data["hardware"]["threads"]}
        resumed = before.get("resumed", [])
        earlier = {key: before[key] for key in _EARLIER if key in before} | (resumed[-1] if resumed else {})
        self.data["earlier"] = [*before.get("earlier", []), earlier]
        self.data["resumed"] = [*resumed, own]
        self.data |= {key: before[key] for key in ("argv", "started") if key in before}
        threads = before.get("hardware", {}).get("threads", own["threads"])
        self.data["hardware"]["threads"] = threads
        if threads != own["threads"]:
            self._note(
                f"this run began with {threads} threads and goes on with {own['threads']}: results may differ in their "
                "last digits"
            )
        known = {plugin["plugin"]: plugin.get("sha256") for plugin in before.get("plugins", [])}
        for plugin in self.data["plugins"]:
            if known.get(plugin["plugin"], plugin.get("sha256")) != plugin.get("sha256"):
                self._note(f"the plugin {plugin['plugin']} is another than when this run began")

    def _note(self, text: str) -> None:
        if self._is_writer:
            console.say(f"note: {text}")

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
            state = "out_of_memory" if out_of_memory(error) else "failed"
            self.data["state"] = next((state for kind, state in _STATES if isinstance(error, kind)), state)
            self.data["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            with suppress(OSError):  # the disk is full, or the folder is gone: what ended the run says so
                self._write_end()
            raise

    def _write_end(self) -> None:
        if "parameters" in self.data:
            self.write()
        elif self._is_writer and self._before is not None:
            ended = {key: self.data[key] for key in ("state", "error")}
            write_json(self._folder / RECORD, {**self._before, **ended})
        elif self._is_writer:
            self._folder.discard()  # refused before anything ran: leave nothing behind
