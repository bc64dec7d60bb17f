"""What a command line amounts to before any option is given: the defaults of attention, task, data, optimizer, trainer.

The command line's own parser says the same and takes a third of a second a call; a test holds the two together.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from astbench.backbones.presets import BackboneConfig
from astbench.bench.config import BenchConfig
from astbench.tasks import find_task
from astbench.training.optim import OptimConfig
from astbench.training.trainer import TRAINER_DEFAULTS
from astbench_registry.depth.registry import depth_config_class
from astbench_registry.registry import config_class, current_names
from astbench_registry.transforms.registry import transform_config_class

GROUPS = ("attention", "task", "transform", "depth", "data", "optim", "backbone", "trainer")
"""Groups of options that decide what a run computes."""

Options = dict[str, Any]
"""`group.option` -> value."""


def flatten(config: Mapping[str, Any]) -> Options:
    """`{group: {option: value}}` as `{group.option: value}`, with the seed and what the weights start from."""
    groups = {**config, "attention": current_names(config.get("attention") or {})}
    flat = {f"{group}.{key}": value for group in GROUPS for key, value in (groups.get(group) or {}).items()}
    flat["seed_everything"] = config.get("seed_everything", config.get("seed", 0))
    flat |= {key: config.get(key) for key in ("init_from", "ckpt_path")}
    return flat


@cache
def _of(attention: str, task: str) -> Mapping[str, Any]:
    _, data, config = find_task(task).load()
    return flatten(
        {
            "attention": {"name": attention, **asdict(config_class(attention)())},
            "task": {"name": task, **asdict(config())},
            "transform": {"name": None},
            "depth": {"name": None},
            "data": _arguments(data),
            "optim": asdict(OptimConfig()),
            "backbone": asdict(BackboneConfig()),
            "trainer": {**_trainer(), **TRAINER_DEFAULTS},
        }
    )


def defaults(attention: str, task: str, source: str, transform: str | None = None, depth: str | None = None) -> Options:
    """Every option of `astbench fit --attention=... --task=... --data.source=...` when no other is given.

    Args:
        attention: Registered name.
        task: Registered name.
        source: Of the data.
        transform: Registered name, whose options are there too; None for none.
        depth: Likewise.

    Raises:
        NameOrPluginError: an unknown task.
        RegistryError: an unknown attention, transform or depth policy.
    """
    found = {**_of(attention, task), "data.source": source}
    if transform is not None:
        options = transform_config_class(transform)().as_dict()
        found |= {f"transform.{option}": value for option, value in options.items()}
    if depth is not None:
        found |= {f"depth.{option}": value for option, value in depth_config_class(depth)().as_dict().items()}
    demo = find_task(task).demo if source == find_task(task).sources[0] else {}
    return {**found, **{key: value for key, value in demo.items() if key in found}}


def bench_defaults() -> Options:
    """Every option of `astbench bench` when none is given."""
    return asdict(BenchConfig())


def _arguments(cls: type) -> Options:
    """Defaults of a constructor's options; `**options` are those of the class above."""
    found: Options = {}
    for level in reversed(cls.__mro__):
        own = vars(level).get("__init__")
        if own is None or level.__module__.partition(".")[0] != "astbench":
            continue
        parameters = inspect.signature(own).parameters.values()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            found = {}
        found |= {p.name: p.default for p in parameters if p.default is not p.empty}
        found |= {p.name: None for p in parameters if p.default is p.empty and p.name == "source"}
    return found


@cache
def _trainer() -> Mapping[str, Any]:
    from lightning.pytorch import Trainer

    parameters = inspect.signature(Trainer.__init__).parameters.values()
    return {**{p.name: p.default for p in parameters if p.name != "self"}, "threads": None}
