"""`--depth`: records which layers ran in an evaluation, of each input and on average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from astbench.backbones.depth.counting import DepthCount
from astbench.backbones.depth.folding import Folded
from astbench.errors import CheckpointError
from astbench.files.writing import write_json
from astbench.runs.folder import DEPTHS, RunFolder
from astbench.tasks.base import of_all_processes
from astbench.training.module import TaskModule


class DepthCallback(pl.Callback):
    """Counts during the evaluation that the record is about."""

    def __init__(self) -> None:
        self._count = DepthCount()
        self._items: dict[str, Any] = {}
        self._passes: list[list[dict[str, Any]]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here every pass counts."""
        if trainer.state.fn != TrainerFn.FITTING:
            _folding(pl_module).seen = self._add

    on_test_start = on_predict_start = on_validation_start

    def _add(self, folded: Folded) -> None:
        self._passes.append(self._count.add(folded))

    def _one_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any, **_: Any) -> None:
        """Whose paths they were, where a batch is one pass; of a pair the second stands behind the first."""
        passes, self._passes = self._passes, []
        index = arguments[1].get("index") if isinstance(arguments[1], dict) else None
        if len(passes) != 1 or not isinstance(index, Tensor) or len(passes[0]) % len(index):
            return
        for row, item in enumerate(passes[0]):
            self._items.setdefault(str(int(index[row % len(index)])), []).append(item)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _one_batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Later passes are no part of the evaluation."""
        _folding(pl_module).seen = None

    on_test_end = on_predict_end = on_validation_end

    def record(self, module: pl.LightningModule, folder: RunFolder) -> dict[str, Any]:
        """What the record says, over all processes; every one of them has to come here."""
        assert isinstance(module, TaskModule) and module.adaptive is not None
        adaptive = module.adaptive
        parts = of_all_processes(module.trainer, (self._count, self._items))
        count = sum((part for part, _ in parts), DepthCount())
        items = {key: said for _, part in parts for key, said in part.items()}
        if items and module.trainer.is_global_zero:
            write_json(folder / DEPTHS, items)
        costs = adaptive.stack.shape.costs
        found = {"name": adaptive.name, **count.summary(costs), "costs": list(costs)}
        return {"depth": {**found, "programs": adaptive.folding.programs.facts()}}


def check_trained_depth(file: Path, trained: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Refuse a checkpoint of another depth policy.

    Args:
        file: The checkpoint.
        trained: The policy's options with its name that it was trained with; None for none.
        now: Those that were asked for.

    Raises:
        CheckpointError: they differ.
    """
    if trained == now:
        return
    if trained is not None and now is not None and trained["name"] == now["name"]:
        differs = {key: (value, now.get(key)) for key, value in trained.items() if now.get(key) != value}
        raise CheckpointError(f"{file} was trained with other depth options (checkpoint, given): {differs}")
    was, asked = ("no depth policy" if one is None else f"--depth={one['name']}" for one in (trained, now))
    raise CheckpointError(
        f"{file} was trained with {was}, and {asked} was asked for; to run its weights at another depth use --init_from"
    )


def _folding(module: pl.LightningModule) -> Any:
    assert isinstance(module, TaskModule) and module.adaptive is not None
    return module.adaptive.folding
