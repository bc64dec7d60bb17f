"""What was attended to in the first evaluation batch: density per layer and head, backends, and the picture."""

from __future__ import annotations

from typing import Any

import torch

from astbench.runs.folder import RunFolder
from astbench.runs.picture import draw_pattern
from astbench.training.module import TaskModule
from astbench.training.sharding import FullyShardedStrategy
from astbench_registry.interface import AttentionStats


def measure_attended(module: TaskModule, batch: Any, folder: RunFolder) -> dict[str, Any]:
    """Run a batch once more, and draw it; what the record holds of it.

    Args:
        module: In a trainer; left in evaluation mode.
        batch: This process's first evaluation batch, not None in the first process; of a sharded model every process
            takes the first one's, since a pass needs them all.
        folder: Where the picture goes.
    """
    if isinstance(module.trainer.strategy, FullyShardedStrategy):
        batch = module.trainer.strategy.broadcast(batch)
    elif not module.trainer.is_global_zero:
        return {}
    return {} if batch is None else _measure(module, batch, folder)


@torch.no_grad()
def _measure(module: TaskModule, batch: Any, folder: RunFolder) -> dict[str, Any]:
    module.eval()
    batch = module.trainer.strategy.batch_to_device(batch)
    with module.swapped.collecting_stats() as slots:
        module(batch)
        stats = {slot.path: slot.stats for slot in slots if slot.stats is not None}
        found: dict[str, Any] = {
            "density": _density(stats),
            "backends": sorted({s.backend for s in stats.values()}),
        }
        if module.trainer.is_global_zero:
            real = {slot.path: module.real_lengths(batch, slot.pattern) for slot in slots}
            known = {path: lengths for path, lengths in real.items() if lengths is not None}
            file = folder / "pattern.png"
            found["picture"] = draw_pattern(file, list(stats.items()), module.swapped.name, known or None)
    return found


def _density(stats: dict[str, AttentionStats]) -> dict[str, Any]:
    layers = {path: [round(d, 5) for d in s.density.tolist()] for path, s in stats.items()}
    everything = [d for row in layers.values() for d in row]
    return {
        "mean": sum(everything) / len(everything) if everything else None,
        "layers": layers,
        "measured_on": "the first evaluation batch",
    }
