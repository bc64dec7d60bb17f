"""Sample order as a pure function of (seed, epoch, step): nothing to save, nothing to lose on a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch.utils.data import Sampler

from astbench.training.seeds import derived_seed

POOL_BATCHES = 50
"""Steps whose examples are sorted by length together."""


class Draw(NamedTuple):
    """Which example, in which epoch: a dataset may cut another window of it each time."""

    epoch: int
    example: int


class StepBatchSampler(Sampler[list[Draw]]):
    """Batches of one epoch, starting where the trainer's step counter stands.

    The order of epoch e is the permutation seeded by (seed, e). After a resume the trainer has restored its
    step, so the first batch drawn is the one that the killed process would have drawn next. Under DDP each
    rank takes its own share of every batch.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and process.
        seed: Of the order.
        trainer: Read for the step, the accumulation and the rank, at the time of iterating.
        first_epoch: The order of the first epoch, where there is a curriculum; None for a permutation.
        lengths: Lengths of the examples, to put similar ones into one batch (less padding): the permutation is
            cut into pools, sorted within each, and the batches are shuffled again.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        trainer: pl.Trainer,
        first_epoch: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed, self.trainer = size, batch_size, seed, trainer
        self.first_epoch, self.lengths = first_epoch, lengths

    def __len__(self) -> int:
        """Batches of an epoch: whole optimizer steps."""
        accumulate = self.trainer.accumulate_grad_batches
        per_step = self.batch_size * self.trainer.world_size * accumulate
        return max(1, self.size // per_step) * accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        batches = len(self)
        epoch, first = divmod(self.trainer.global_step * self.trainer.accumulate_grad_batches, batches)
        order = self.order(epoch)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        for batch in range(first, batches):
            start = (batch * world + rank) * self.batch_size
            # A set smaller than one step is repeated to fill it.
            picks = [order[i % self.size] for i in range(start, start + self.batch_size)]
            yield [Draw(epoch, example) for example in picks]

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch in the order they are drawn."""
        if epoch == 0 and self.first_epoch is not None:
            return list(self.first_epoch)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        if self.lengths is None:
            return order
        lengths, per_step = self.lengths, self.batch_size * self.trainer.world_size
        pool = POOL_BATCHES * per_step
        pools = [sorted(order[i : i + pool], key=lengths.__getitem__) for i in range(0, self.size, pool)]
        steps = [p[i : i + per_step] for p in pools for i in range(0, len(p), per_step)]
        # What does not fill a step stays last: only there may the batch boundaries shift.
        full = [s for s in steps if len(s) == per_step]
        rest = [index for s in steps if len(s) < per_step for index in s]
        shuffled = torch.randperm(len(full), generator=generator).tolist()
        return [index for number in shuffled for index in full[number]] + rest
