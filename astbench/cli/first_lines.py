"""What a run says of itself before it begins, in its record and to the reader."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from astbench import console
from astbench.runs.folder import RunFolder
from astbench.tasks import Task
from astbench.training.module import TaskModule


def run_facts(trainer: pl.Trainer, module: TaskModule) -> dict[str, Any]:
    """What the record holds of the model, the data and where the attention stands."""
    data, handle = trainer.datamodule.describe(), module.swapped  # type: ignore[attr-defined]
    return {
        "parameters": module.counts(),
        "data": data,
        "attached": {"layers": len(handle.slots), "patterns": sorted({s.pattern for s in handle.slots})},
        "precision": str(trainer.precision),
        "notes": [*handle.notes, *data["notes"], *training_notes(trainer, module)],
    }


def training_notes(trainer: pl.Trainer, module: TaskModule) -> list[str]:
    """What the attention has to say of a training run of this length."""
    if trainer.state.fn != TrainerFn.FITTING:
        return []
    return module.swapped.slots[0].attention.config.notes(trainer.max_steps)


def say_first_lines(
    command: str, task: Task, trainer: pl.Trainer, module: TaskModule, facts: dict[str, Any], folder: RunFolder
) -> None:
    """Print what is about to run, from :func:`run_facts`."""
    counts, handle = facts["parameters"], module.swapped
    options = " ".join(f"{name}={value}" for name, value in handle.slots[0].attention.config.headline().items())
    console.say(f"astbench {command}")
    console.table(
        {
            "attention": f"{handle.name} in {len(handle.slots)} layers {options}",
            **_transform(module),
            **_depth(module),
            "task": task.name,
            "source": _source(facts["data"]),
            "backbone": f"{module.backbone.name}, {counts['total']:,} parameters, {counts['attention']:,} of them "
            f"the attention's own, {counts['trainable']:,} learn",
            "device": f"{trainer.strategy.root_device} x {trainer.world_size}, precision {trainer.precision}, "
            f"{torch.get_num_threads()} threads",
            "backend": _backend(module),
            "run folder": folder.path,
        }
    )
    for note in facts["notes"]:
        console.say(f"  note: {note}")


def _transform(module: TaskModule) -> dict[str, str]:
    """The transform of attention weights, where there is one."""
    transforming = module.swapped.transforming
    if transforming is None:
        return {}
    options = " ".join(f"{name}={value}" for name, value in transforming.config.headline().items())
    return {"transform": f"{transforming.name} in {len(transforming.slots)} layers {options}"}


def _depth(module: TaskModule) -> dict[str, str]:
    """The depth policy, where there is one."""
    adaptive = module.adaptive
    if adaptive is None:
        return {}
    options = " ".join(f"{name}={value}" for name, value in adaptive.config.headline().items())
    return {"depth": f"{adaptive.name} over {adaptive.stack.shape.num_layers} layers {options}"}


def _backend(module: TaskModule) -> str:
    """The kernel that runs; under a transform weights are written out instead, which is slower."""
    handle, device = module.swapped, next(module.parameters()).device
    planned = handle.slots[0].attention.planned_backend(device)
    if handle.transforming is None:
        return planned
    explicit = f"explicit weights in torch on {device.type}, for the transform"
    same = len(handle.transforming.slots) == len(handle.slots)
    return explicit if same else f"{explicit}; {planned} in the other layers"


def _source(data: dict[str, Any]) -> str:
    pairs = data.get("questions") or data.get("pairs") or data.get("examples") or {}
    counts = ", ".join(
        [f"{n} {split}" for split, n in pairs.items()]
        + [f"{n:,} {split} tokens" for split, n in data.get("split_tokens", {}).items()]
    )
    what = {"demo": "demo (generated, not the real data set)"}.get(data["source"], data["source"])
    return f"{what}{' ' + data['path'] if data['path'] else ''}{': ' + counts if counts else ''}"
