"""What a run cost: floating-point operations and tokens, counted at a few steps and batches spread over all of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from astbench.backbones.flop_count import FlopCount
from astbench.runs.run_record import RunRecord
from astbench.training.module import TaskModule
from astbench.training.sharding import FullyShardedStrategy

COUNTED = 8
"""Steps of a training, and batches of an evaluation, that are counted at most."""

GOLDEN = (5**0.5 - 1) / 2


def counted_at(number: int) -> set[int]:
    """Which of `number` steps are counted: one in each of up to `COUNTED` equal parts, at other places in each.

    Schedules make steps differ, some by turns: at equal distances all might be of one kind.
    """
    parts = max(1, min(COUNTED, number // COUNTED))
    return {int((part + (0.5 + part * GOLDEN) % 1.0) * number / parts) for part in range(parts)} if number else set()


class CountedWork(Callback):
    """Counts, and enters the sums in the record: of each counted step times as many steps as it stands for.

    A counted step takes longer than others and comes out the same. Nothing is counted of what `predict` does, of
    compiled layers and of sharded models. Of several processes the first is counted, and stands for all.

    Args:
        record: Of the run; what an earlier process of the same run has counted is in it.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._chosen: set[int] = set()
        self._count: FlopCount | None = None
        self._open = ExitStack()
        self._step, self._tokens, self._batches = -1, 0, 0
        self._evaluated: dict[str, list[float]] = {}

    # -- training ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the steps."""
        assert isinstance(pl_module, TaskModule)
        if not pl_module.backbone.compile:
            self._chosen = self._choose(trainer, trainer.max_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count from here, if it is a chosen step's first batch."""
        if self._step != trainer.global_step:
            self._step, self._tokens = trainer.global_step, 0
            if self._step in self._chosen:
                self._start(pl_module)
        if self._count is not None:
            assert isinstance(pl_module, TaskModule)
            self._tokens += pl_module.input_tokens(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over when the number of steps has grown."""
        if self._count is not None and trainer.global_step != self._step:
            counted = self._record.data.setdefault("flops", {}).setdefault("training_steps", {})
            counted[str(self._step)] = self._stop()

    # -- evaluation -------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the batches, of the evaluation that the record is about."""
        self._evaluated, self._batches = {}, 0
        if trainer.state.fn != TrainerFn.FITTING:
            self._chosen = self._choose(trainer, int(sum(trainer.num_val_batches)))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise."""
        self._evaluated, self._batches = {}, 0
        self._chosen = self._choose(trainer, int(sum(trainer.num_test_batches)))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Count from here, if it is chosen."""
        if trainer.state.fn != TrainerFn.FITTING and self._batches in self._chosen:
            self._start(pl_module)
            assert isinstance(pl_module, TaskModule)
            self._tokens = pl_module.input_tokens(arguments[0])

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """It is over."""
        if trainer.state.fn == TrainerFn.FITTING:
            return
        if self._count is not None:
            self._evaluated[str(self._batches)] = self._stop()
        self._batches += 1

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Whatever ended the run, nothing goes on counting."""
        self._open.close()

    # -- both -------------------------------------------------------------------------------------------

    def _choose(self, trainer: pl.Trainer, number: int) -> set[int]:
        sharded = isinstance(trainer.strategy, FullyShardedStrategy)
        return set() if sharded or not trainer.is_global_zero else counted_at(max(0, number))

    def _start(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TaskModule)
        self._count = FlopCount(module.swapped)
        self._open.enter_context(self._count.counting())

    def _stop(self) -> list[float]:
        assert self._count is not None
        self._open.close()
        work, self._count = self._count.work, None
        return [work.model, work.attending, work.beside, float(self._tokens)]

    def finish(self, module: TaskModule) -> None:
        """Enter what was counted in the record."""
        data, processes = self._record.data, module.trainer.world_size
        flops = data.get("flops", {})
        steps = data.get("train", {}).get("steps", 0)
        parts = {"training": (flops.get("training_steps", {}), steps), "evaluation": (self._evaluated, self._batches)}
        for name, (counted, number) in parts.items():
            if counted and number:
                flops[name] = _summed(module, list(counted.values()), number, processes)
        if flops:
            data["flops"] = flops


def _summed(module: TaskModule, counted: list[list[float]], number: int, processes: int) -> dict[str, Any]:
    """Means over what was counted, times how often that ran.

    None stands for what no counter sees: an attention of which nothing showed, and choosing where Triton may have done
    a part.
    """
    times = number * processes / len(counted)
    model, attending, beside, tokens = (times * sum(part) for part in zip(*counted, strict=True))
    attention: int | None = round(attending + beside) or None
    found: dict[str, Any] = {"model": round(model), "attention": attention}
    first = module.swapped.slots[0].attention
    if first.block_sparse:
        fused = first.planned_backend(module.device).startswith("triton")
        found["choosing"] = None if fused else round(beside)
    return {**found, "tokens": round(tokens) or None, "counted": len(counted), "of": number}
