"""Lightning's checkpoint reading and writing, made safe: atomic, hashed, two kept, weights only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from astbench.errors import CheckpointError, UnwrittenCheckpoint
from astbench.files.writing import sync_folder, write_atomic
from astbench.runs.folder import KEPT, LAST, PREVIOUS, RunFolder, checkpoint_file


class SafeCheckpointIO(CheckpointIO):
    """Writes `last.ckpt`, keeps the one before as `previous.ckpt`, verifies on reading.

    Order of a save: the new file whole beside the old ones; its digest into the manifest; last -> previous;
    new -> last. Killed anywhere between, a file that matches the manifest remains.

    Attributes:
        reads: The checkpoint that was asked for last; None before.
    """

    reads: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See Lightning. `path` must be the run folder's `last.ckpt`, or that of weights to be kept."""
        path = Path(path)
        folder = RunFolder(path.parent)
        fresh = path.with_name("new.ckpt")
        try:
            digest = write_atomic(fresh, lambda file: torch.save(checkpoint, file))
            about = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
            folder.remember(digest, about if path.name == LAST else {**about, KEPT: path.name})
            if path.name == LAST and path.exists():
                os.replace(path, folder / PREVIOUS)
            os.replace(fresh, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            raise UnwrittenCheckpoint(f"checkpoint {path} could not be written: {_reason(error)}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """See Lightning; tensors and plain data only.

        Raises:
            CheckpointError: missing, damaged, or holding anything but tensors and plain data.
        """
        self.reads = Path(path)
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """See Lightning."""
        Path(path).unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What the system said; torch's writer makes a RuntimeError of its own of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A verified checkpoint on the CPU. Raises as :class:`SafeCheckpointIO`."""
    file = checkpoint_file(path)
    try:
        data: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling damaged bytes may raise is anybody's guess
        raise CheckpointError(f"checkpoint {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return data
