"""Lightning's checkpoint reading and writing, made safe: atomic, hashed, two kept, weights only."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from astbench.errors import CheckpointError
from astbench.files.writing import sync_folder, write_atomic
from astbench.runs.folder import LAST, PREVIOUS, RunFolder, checkpoint_file


class SafeCheckpointIO(CheckpointIO):
    """Writes `last.ckpt`, keeps the one before as `previous.ckpt`, verifies on reading.

    Order of a save: the new file whole beside the old ones; its digest into the manifest; last -> previous;
    new -> last. Killed anywhere between, a file that matches the manifest remains.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See Lightning. `path` must be the run folder's `last.ckpt`."""
        path = Path(path)
        folder = RunFolder(path.parent)
        fresh = path.with_name("new.ckpt")
        try:
            digest = write_atomic(fresh, lambda file: torch.save(checkpoint, file))
            folder.remember(digest, {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]})
            if path.name == LAST and path.exists():
                os.replace(path, folder / PREVIOUS)
            os.replace(fresh, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint {path} could not be written: {reason}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """See Lightning; tensors and plain data only.

        Raises:
            CheckpointError: missing, damaged, or holding anything but tensors and plain data.
        """
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """See Lightning."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A verified checkpoint on the CPU. Raises as :class:`SafeCheckpointIO`."""
    file = checkpoint_file(path)
    try:
        data: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return data
