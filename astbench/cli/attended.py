"""What was attended to in an evaluation: density per layer and head, backends, and the picture."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from astbench.backbones.hooks import AttentionSlot
from astbench.runs.folder import RunFolder
from astbench.runs.picture import draw_pattern
from astbench.tasks.base import of_all_processes
from astbench.training.module import TaskModule
from astbench.training.sharding import FullyShardedStrategy


class AttendedPairs:
    """Adds up (query, key) pairs over every attention call of an evaluation, of each layer.

    A call is what the evaluation itself makes: a whole sequence where it scores, one token where it decodes.

    Attributes:
        batches: Evaluation batches of this process.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # computed and tiles (heads,), visible (); by layer
        self._backends: set[str] = set()
        self._open = ExitStack()

    def start(self, module: TaskModule) -> None:
        """From here every call counts."""
        for slot in self._open.enter_context(module.swapped.collecting_stats()):
            self._open.callback(slot.register_forward_hook(self._add).remove)

    def stop(self) -> None:
        """The evaluation is over."""
        self._open.close()

    def _add(self, slot: AttentionSlot, arguments: Any, output: Any) -> None:
        stats = slot.stats
        if stats is None:
            return
        # Tensors, not numbers: reading one would wait for the device at every call.
        computed, visible = stats.computed.sum(0), stats.visible.sum()
        tiles = torch.full_like(computed, torch.nan) if stats.tiles is None else stats.tiles.sum(0)
        if slot.path in self._pairs:
            before = self._pairs[slot.path]
            computed, tiles, visible = computed + before[0], tiles + before[1], visible + before[2]
        self._pairs[slot.path] = computed, tiles, visible
        self._backends.add(stats.backend)

    def record(self, module: TaskModule) -> dict[str, Any]:
        """Density and backends over all processes; every one of them has to come here.

        Where all layers carry their lists, also the share of tiles that a kernel has to compute; of a calibrated budget
        the least share of a row's mass that it keeps.
        """
        pairs = {path: (c.tolist(), t.tolist(), float(visible)) for path, (c, t, visible) in self._pairs.items()}
        parts = of_all_processes(module.trainer, (pairs, self._backends, self.batches))
        layers: dict[str, list[float]] = {}
        tiles: list[float] = []
        for path in (slot.path for slot in module.swapped.slots):
            found = [part[path] for part, _, _ in parts if path in part]
            if found:
                visible = max(1.0, sum(seen for _, _, seen in found))
                layers[path] = [round(sum(head) / visible, 5) for head in zip(*(c for c, _, _ in found), strict=True)]
                tiles += [sum(head) / visible for head in zip(*(t for _, t, _ in found), strict=True)]
        everything = [d for row in layers.values() for d in row]
        batches = sum(count for _, _, count in parts)
        density = {
            "mean": sum(everything) / len(everything) if everything else None,
            "layers": layers,
            "measured_on": f"every attention call of the whole evaluation, {batches} batches",
        }
        if tiles and not any(map(math.isnan, tiles)):
            density["tiles"] = sum(tiles) / len(tiles)
        share = module.swapped.calibrated_share
        if share is not None:
            density["calibrated_share"] = share
        return {"density": density, "backends": sorted(set().union(*(names for _, names, _ in parts)))}


@torch.no_grad()
def draw_attended(module: TaskModule, batch: Any, folder: RunFolder) -> dict[str, Any]:
    """Run a batch once more, and draw what its first sequence attended to; the picture's name, for the record.

    Args:
        module: In a trainer; left in evaluation mode.
        batch: This process's first evaluation batch, not None in the first process; of a sharded model every process
            takes the first one's, since a pass needs them all.
        folder: Where the picture goes.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, FullyShardedStrategy):
        batch = strategy.broadcast(batch)
    elif not module.trainer.is_global_zero:
        return {}
    if batch is None:
        return {}
    module.eval()
    batch = strategy.batch_to_device(batch)
    with module.swapped.collecting_stats() as slots:
        module(batch)
        if not module.trainer.is_global_zero:
            return {}
        stats = [(slot.path, slot.stats) for slot in slots if slot.stats is not None]
        real = {slot.path: module.real_lengths(batch, slot.pattern) for slot in slots}
        known = {path: lengths for path, lengths in real.items() if lengths is not None}
        causal = {slot.path for slot in slots if slot.pattern == "causal_self"}
        name = draw_pattern(folder / "pattern.png", stats, module.swapped.name, known or None, causal)
        return {"picture": name}
