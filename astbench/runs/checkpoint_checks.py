"""What a checkpoint must hold, said in one line: a file that is whole can hold the wrong things."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from astbench.errors import CheckpointError

_ALWAYS: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
}
_TO_RESUME: dict[str, type] = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "callbacks": dict}


def check_content(checkpoint: Any, file: str | Path, *, resume: bool = False) -> dict[str, Any]:
    """The checkpoint, if it holds what a run writes.

    Args:
        checkpoint: As it was read.
        file: Where it came from.
        resume: It must also hold what going on needs: optimizer, schedule and loops.

    Raises:
        CheckpointError: names what is missing, or of another kind.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"checkpoint {file} holds a {type(checkpoint).__name__}, and no run's state")
    for name, kind in {**_ALWAYS, **(_TO_RESUME if resume else {})}.items():
        if not isinstance(checkpoint.get(name), kind):
            found = f"a {type(checkpoint[name]).__name__} as its" if name in checkpoint else "no"
            raise CheckpointError(f"checkpoint {file} holds {found} {name}: {_instead(resume)}")
    if not all(isinstance(weight, Tensor) for weight in checkpoint["state_dict"].values()):
        raise CheckpointError(f"checkpoint {file} holds weights that are no tensors")
    trained = checkpoint["hyper_parameters"]
    groups = [trained.get(group) for group in ("attention", "backbone")]
    if not all(isinstance(g, dict) for g in groups) or not isinstance(trained.get("task"), dict | None):
        raise CheckpointError(f"checkpoint {file} does not say which attention, backbone and task it is of")
    if not isinstance(trained["attention"].get("name"), str):
        raise CheckpointError(f"checkpoint {file} does not name its attention")
    return checkpoint


def _instead(resume: bool) -> str:
    return "it cannot be resumed; start anew from its weights with --init_from=RUN" if resume else "no run wrote it so"


def check_weights(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not the model's, in one line; torch names every one of them.

    Raises:
        CheckpointError: one is missing, unknown, or of another shape.
    """
    wrong = sorted(given.keys() ^ wanted.keys())
    wrong = wrong or sorted(name for name in wanted if given[name].shape != wanted[name].shape)
    if not wrong:
        return
    name = wrong[0]
    if name not in given:
        how = "is missing"
    elif name not in wanted:
        how = "is unknown"
    else:
        how = f"is {tuple(given[name].shape)}, and not {tuple(wanted[name].shape)}"
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise CheckpointError(f"{what} does not fit the model: {name} {how}{others}")


def check_restored(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on where a part was not restored: Lightning passes over what a list lacks.

    Raises:
        CheckpointError: the loops stand elsewhere than the weights, or the optimizer's state is not the model's.
    """
    step = checkpoint["global_step"]
    problem = ""
    if trainer.global_step != step:
        problem = f"its loops stand at step {trainer.global_step}, its weights at step {step}"
    for name, there in (("optimizer_states", trainer.optimizers), ("lr_schedulers", trainer.lr_scheduler_configs)):
        if len(checkpoint[name]) != len(there):
            problem = f"it holds {len(checkpoint[name])} {name}, and the run has {len(there)}"
    for optimizer in trainer.optimizers:
        if step and not optimizer.state:
            problem = "it holds no state of the optimizer"
        for parameter, state in optimizer.state.items():
            shapes = {tuple(part.shape) for part in state.values() if isinstance(part, torch.Tensor) and part.dim()}
            if shapes - {tuple(parameter.shape)}:
                problem = "the optimizer's state is of another shape than the weights"
    if problem:
        raise CheckpointError(f"the checkpoint cannot be resumed, {problem}; start anew with --init_from=RUN")
