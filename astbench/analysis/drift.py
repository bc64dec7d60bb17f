"""How what was chosen changes while a model learns: the same inputs under the weights of several steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astbench.analysis.rows import overlap
from astbench.analysis.watch import Seen, watching_choices
from astbench.errors import CheckpointError
from astbench.runs.checkpoint_checks import check_content, check_weights
from astbench.runs.checkpoints import read_checkpoint
from astbench.training.averaging import final_weights
from astbench.training.module import TaskModule
from astbench_registry.registry import current_names

MEASURES = ("kept", "mass", "best")


@dataclass
class Choices:
    """What was chosen under the weights of one step.

    Attributes:
        step: Optimizer steps before it.
        blocks: By layer, of each batch: bool `(batch, heads, rows, blocks)`, chosen of those that compete.
        means: By layer, of each of `MEASURES`: `(heads,)`, means over real rows, as in :class:`RowFacts`.
    """

    step: int
    blocks: dict[str, list[Tensor]]
    means: dict[str, dict[str, list[float]]]


def read_weights(file: Path, module: TaskModule) -> tuple[int, dict[str, Tensor]]:
    """The step of a checkpoint, and what its run would be evaluated with.

    Raises:
        CheckpointError: damaged, of another attention or backbone, or of weights that do not fit.
    """
    checkpoint = check_content(read_checkpoint(file), file)
    trained = checkpoint["hyper_parameters"]
    own = {"attention": current_names(module.attention), "backbone": dict(module.hparams.get("backbone") or {})}
    given = {"attention": current_names(trained["attention"]), "backbone": dict(trained["backbone"])}
    for group, options in own.items():
        if {**given[group], "backend": None} != {**options, "backend": None}:
            raise CheckpointError(f"{file} was trained with other {group} options: --drift compares steps of one model")
    weights = final_weights(checkpoint)
    check_weights(weights, module.state_dict(), str(file))
    return int(checkpoint["global_step"]), weights


@torch.no_grad()
def look(module: TaskModule, batches: Sequence[Any], rows: int, step: int) -> Choices:
    """Run the batches, and keep what every layer chose for some rows."""
    blocks: dict[str, list[Tensor]] = {}
    sums: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, float] = {}

    def see(seen: Seen) -> None:
        facts, path = seen.facts, seen.slot.path
        blocks.setdefault(path, []).append((facts.chosen & seen.free).cpu())
        real = facts.real[:, None]
        counts[path] = counts.get(path, 0.0) + float(facts.real.sum())
        for name in MEASURES:
            total = (getattr(facts, name) * real).double().sum((0, 2)).cpu()
            held = sums.setdefault(path, {})
            held[name] = held[name] + total if name in held else total

    with watching_choices(module, rows, see):
        for batch in batches:
            module(module.trainer.strategy.batch_to_device(batch))
    means = {path: {name: (v / counts[path]).tolist() for name, v in held.items()} for path, held in sums.items()}
    return Choices(step, blocks, means)


def drift(
    module: TaskModule,
    batches: Sequence[Any],
    rows: int,
    files: Sequence[Path],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Overlap, keys kept and mass under each file's weights, the model's present ones last; these are put back.

    Args:
        module: In a trainer and in evaluation mode, with the last weights.
        batches: The same for all.
        rows: Query rows looked at in each sequence.
        files: Checkpoints of the same model, in the order in which they are compared.
        say: Told of each.

    Returns:
        `checkpoints`: step and file of each (None: the model as it was); `layers`: by path, of each checkpoint and head
        the means of `MEASURES`, `to_before` and `to_last`: overlap (intersection over union) of the blocks that a row
        chose with those under the weights before (None of the first), and under the last ones. Means over rows that
        chose, None of a head without any. Blocks that are always kept do not count.
    """
    here = {name: value.clone() for name, value in module.state_dict().items()}
    assert module.trainer.ckpt_path is not None, "asked for only with a checkpoint"
    own_step = torch.load(module.trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    last = look(module, batches, rows, int(own_step))
    found: list[dict[str, Any]] = []
    layers: dict[str, dict[str, list[Any]]] = {}
    before: Choices | None = None
    try:
        for file in [*files, None]:
            if file is None:
                now = last
            else:
                step, weights = read_weights(file, module)
                module.load_state_dict(weights)
                now = look(module, batches, rows, step)
            say(f"looked at the choices of step {now.step:,}")
            found.append({"step": now.step, "file": None if file is None else file.name})
            for path in now.blocks:
                layer = layers.setdefault(path, {name: [] for name in (*MEASURES, "to_before", "to_last")})
                for name in MEASURES:
                    layer[name].append([round(value, 6) for value in now.means[path][name]])
                layer["to_before"].append(None if before is None else _overlap(now, before, path))
                layer["to_last"].append(_overlap(now, last, path))
            before = now
    finally:
        module.load_state_dict(here)
    return {"checkpoints": found, "layers": layers}


def _overlap(one: Choices, other: Choices, path: str) -> list[float | None]:
    """By head."""
    total, count = torch.zeros(()), torch.zeros(())
    for mine, theirs in zip(one.blocks[path], other.blocks[path], strict=True):
        shared = overlap(mine, theirs)  # (batch, heads, rows), NaN where neither chose
        total = total + shared.nan_to_num().double().sum((0, 2))
        count = count + (~shared.isnan()).sum((0, 2))
    return [round(value, 6) if value == value else None for value in (total / count).tolist()]
