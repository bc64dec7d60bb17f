"""The folder of one run: who may write in it, what is in it, whether it is done. Imports nothing heavy."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from os.path import exists, isdir, isfile  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import IO, Any

from astbench.errors import CheckpointError, ConfigError
from astbench.files.writing import TEMPORARY, sha256, write_json

CONFIG, RECORD, DONE, METRICS = "config.yaml", "record.json", "done.json", "metrics.csv"
LAST, PREVIOUS, MANIFEST, LOCK = "last.ckpt", "previous.ckpt", "manifest.json", ".lock"
TOKENIZER = "tokenizer"
ANALYSIS, EXPLORER = "analysis.json", "explorer.json"
DRIFT, LANGUAGE, VALUES, DEPTHS = "drift.json", "linguistics.json", "values.json", "depth.json"

KEPT = "kept"
"""Of the manifest's entry of weights that stay: the name of their file."""

_OF_TOKENIZER = {"holds": TOKENIZER}
"""The manifest's entry of the tokenizer's digest."""


class RunFolder:
    """Paths of a run and the rules about them.

    `config.yaml` (runs again), `metrics.csv`, `last.ckpt` and `previous.ckpt` with `manifest.json` (sha256 of
    every whole checkpoint), `record.json`, `tokenizer/`, `pattern.png`, and `done.json`, written last. Weights that
    `--keep_every` keeps are `step-N.ckpt`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._claimed = self._fresh = self._made_parent = False

    @classmethod
    def claim(cls, task: str, attention: str) -> RunFolder:
        """A new folder below `runs/`, made at once, so that a run begun in the same second takes another.

        Raises:
            ConfigError: it cannot be made.
        """
        while True:
            folder = cls(default_run_dir(task, attention))
            folder._made_parent = not folder.path.parent.exists()
            try:
                folder.path.mkdir(parents=True)
            except FileExistsError:
                if folder.path.parent.is_dir():
                    continue
                raise ConfigError(f"{folder.path.parent} is a file; name a folder with --run_dir=FOLDER") from None
            except OSError as error:
                raise ConfigError(
                    f"{folder.path} cannot be made: {error.strerror}; name a folder with --run_dir=FOLDER"
                ) from error
            folder._claimed = True
            return folder

    def abandon(self) -> None:
        """Give a claimed folder back, unless something is in it."""
        if self._claimed:
            with suppress(OSError):
                self.path.rmdir()
                if self._made_parent:
                    self.path.parent.rmdir()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def done(self) -> bool:
        """The run ended as it should."""
        return (self / DONE).is_file()

    def open_for_writing(self, *, resume: bool) -> None:
        """Create and lock the folder.

        Raises:
            ConfigError: it holds another run already (and `resume` is False), or somebody writes in it.
        """
        if exists(self.path) and not isdir(self.path):
            raise ConfigError(f"--run_dir={self.path} is a file; a run needs a folder")
        if not resume and exists(self.path) and any(not left_behind(file) for file in self.path.iterdir()):
            raise ConfigError(
                f"{self.path} holds a run already; choose another --run_dir, or continue it with --resume={self.path}"
            )
        self._made_parent |= not exists(self.path.parent)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self / LOCK, "w")  # noqa: SIM115 (held open as long as the run lasts)
        except OSError as error:
            raise ConfigError(f"--run_dir={self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigError(f"another process writes in {self.path}; choose another --run_dir") from error
        _close_in_children(self)
        self._fresh = not resume
        for left in self.path.glob(f".*{TEMPORARY}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (self / DONE).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write in it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove the folder if this process began it and no checkpoint is in it."""
        if self._fresh and not (self / LAST).exists() and not (self / PREVIOUS).exists():
            shutil.rmtree(self.path, ignore_errors=True)
            if self._made_parent:
                with suppress(OSError):  # another run has begun there
                    self.path.parent.rmdir()

    def manifest(self) -> dict[str, Any]:
        """Digest of a checkpoint, or of the tokenizer -> what it holds; empty when there is none."""
        try:
            data = json.loads((self / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self / MANIFEST} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{self / MANIFEST} cannot be read: it is no table of checkpoints")
        return data

    def remember(self, digest: str, about: dict[str, Any]) -> None:
        """Enter a checkpoint in the manifest, keeping the entries of the files still there."""
        there = {sha256(self / name) for name in (LAST, PREVIOUS) if (self / name).is_file()}
        entries = {
            d: entry
            for d, entry in self.manifest().items()
            if d in there or entry == _OF_TOKENIZER or (KEPT in entry and (self / entry[KEPT]).is_file())
        }
        write_json(self / MANIFEST, {**entries, digest: about})

    def kept(self) -> list[Path]:
        """Weights that `--keep_every` kept, by step."""
        files = (file for file in self.path.glob("step-*.ckpt") if file.stem.removeprefix("step-").isdecimal())
        return sorted(files, key=kept_step)

    def save_tokenizer(self, save: Callable[[str], Any]) -> None:
        """Let `save` write the tokenizer, which is there whole or not at all, and enter it in the manifest."""
        fresh = self / f".{TOKENIZER}{TEMPORARY}"
        save(str(fresh))
        digest = _digest(fresh)
        os.replace(fresh, self / TOKENIZER)
        write_json(self / MANIFEST, {**self.manifest(), digest: _OF_TOKENIZER})

    def check_tokenizer(self) -> None:
        """Hold the tokenizer against the manifest; runs of before have no entry of theirs.

        Raises:
            CheckpointError: it is another.
        """
        known = [digest for digest, entry in self.manifest().items() if entry == _OF_TOKENIZER]
        if known and isdir(self / TOKENIZER) and _digest(self / TOKENIZER) not in known:
            raise CheckpointError(f"{self / TOKENIZER} does not match its sha256 in {MANIFEST}: damaged files")

    def newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its entry, an empty one without a manifest; None when there is none.

        Raises:
            CheckpointError: there are checkpoint files, but none matches its digest.
        """
        files = [self / name for name in (LAST, PREVIOUS) if (self / name).is_file()]
        if files and not (self / MANIFEST).exists():
            return files[0], {}  # nothing to hold it against: see `doubts`
        manifest = self.manifest()
        for file in files:
            entry = manifest.get(sha256(file))
            if entry is not None:
                return file, entry
        if files:
            raise CheckpointError(f"no checkpoint in {self.path} matches its sha256 in {MANIFEST}: damaged files")
        return None


def kept_name(step: int) -> str:
    """File of the weights that are kept of a step."""
    return f"step-{step}.ckpt"


def kept_step(file: Path) -> int:
    """The step of such a file."""
    return int(file.stem.removeprefix("step-"))


def _digest(folder: Path) -> str:
    """Of the names and contents of a folder's files."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def _close_in_children(folder: RunFolder) -> None:
    """Leave the lock to this process alone: when it is killed, its loader processes live on for seconds."""
    found = weakref.ref(folder)

    def close() -> None:
        if ours := found():
            ours.close()

    os.register_at_fork(after_in_child=close)


def left_behind(file: Path) -> bool:
    """Whether a run that was killed before its first file leaves such a one."""
    return file.name == LOCK or (file.name.startswith(".") and file.name.endswith(TEMPORARY))


def default_run_dir(task: str, attention: str) -> Path:
    """`runs/<task>-<attention>-<time>`, a name that is free."""
    stem = f"{task}-{Path(attention.split(':')[-1]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / stem
    number = 2
    while path.exists():
        path = Path("runs") / f"{stem}-{number}"
        number += 1
    return path


def checkpoint_file(path: str | Path) -> Path:
    """A checkpoint from its own path or its run folder's, verified against the folder's manifest.

    Raises:
        CheckpointError: missing, damaged, or a folder without one.
    """
    path = Path(path).expanduser()
    if isdir(path):
        found = RunFolder(path).newest_checkpoint()
        if found is None:
            raise CheckpointError(f"no checkpoint in {path}")
        return found[0]
    if not isfile(path):
        raise CheckpointError(f"checkpoint {path} does not exist")
    folder = RunFolder(path.parent)
    if (folder / MANIFEST).exists() and sha256(path) not in folder.manifest():
        raise CheckpointError(f"checkpoint {path} does not match its sha256 in {MANIFEST}: a damaged file")
    return path


def doubts(asked: str | Path, file: Path) -> str:
    """What a user should know of the checkpoint `file` that was found where `asked` says; empty if nothing."""
    folder = RunFolder(file.parent)
    if not (folder / MANIFEST).exists():
        return f"{file} is unverified: no {MANIFEST} beside it holds its sha256"
    if file.name != PREVIOUS or not Path(asked).expanduser().is_dir():
        return ""
    why = "is damaged, its sha256 is another" if (folder / LAST).is_file() else "is missing"
    step = folder.manifest()[sha256(file)].get("step")
    return f"{folder / LAST} {why}: {PREVIOUS} is taken in its place, of step {step}"
