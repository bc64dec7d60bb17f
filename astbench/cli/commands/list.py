"""`astbench list`: everything that has a name."""

from __future__ import annotations

import sys

from astbench.backbones.presets import PRESETS
from astbench.cli.names import read_names
from astbench.errors import ConfigError
from astbench.tasks import registered_tasks
from astbench.tasks.registry import RegisteredTask, task_clashes
from astbench_registry import registered
from astbench_registry.class_table import Registered
from astbench_registry.depth.registry import depth_clashes, registered_depths
from astbench_registry.registry import clashes
from astbench_registry.transforms.registry import registered_transforms, transform_clashes

_MARKS = {
    "bidirectional_self": "bi",
    "causal_self": "ca",
    "bidirectional_cross": "xb",
    "causal_cross": "xc",
}


def run(words: list[str]) -> int:
    """Print the tables; `--plugins=...` adds a plugin's."""
    line = read_names(words)
    if line.help:
        print(
            "usage: astbench list [--plugins=FILE.py|MODULE]\n\n"
            "Every attention, transform, depth policy, task and backbone preset by name."
        )
        return 0
    if unknown := [*line.others(), *line.words]:
        raise ConfigError(f"astbench list takes no {unknown[0]}")
    print("attention       patterns     decode gqa  params layout  paper, or where it comes from")
    for row in registered().values():
        print(_attention(row))
    _print_clashes("attention", clashes())
    print("\n  patterns: bi bidirectional self, ca causal self (ca*: not strictly causal), xb/xc cross-attention of")
    print("  a bidirectional/causal model; params: has parameters of its own; layout: reports its key blocks")
    print("\ntransforms of attention weights (validate, test, predict)")
    for transform in registered_transforms().values():
        print(_summary(transform))
    _print_clashes("transform", transform_clashes())
    print("\ndepth: which layers an input goes through")
    for policy in registered_depths().values():
        print(_summary(policy))
    _print_clashes("depth", depth_clashes())
    print("\ntask")
    for task in registered_tasks().values():
        print(_task(task))
    _print_clashes("task", task_clashes())
    print("\nbackbone presets")
    print(f"  {', '.join(PRESETS)}; tiny and small pick the task's own; else a folder or a Hugging Face name")
    sys.stdout.flush()
    return 0


def _attention(row: Registered) -> str:
    if row.config is None:
        return f"  {row.name:<13} (from {row.source}; not loaded, see `astbench describe {row.name}`)"
    can = row.config().can
    star = "" if can.strictly_causal else "*"
    patterns = " ".join(
        f"{_MARKS[p]}{star if p == 'causal_self' else ''}" if p in can.patterns else " ." for p in _MARKS
    )
    flags = [can.decode, can.gqa, can.owns_parameters, can.yields_layout]
    decode, gqa, params, layout = ("yes" if flag else " - " for flag in flags)
    where = row.config.paper if row.source == "astbench" else f"{row.config.paper or row.summary} [{row.source}]"
    return f"  {row.name:<13} {patterns:<12} {decode:^6} {gqa:^4} {params:^6} {layout:^6}  {where}"


def _summary(row: Registered) -> str:
    if row.config is None:
        return f"  {row.name:<13} (from {row.source}; not loaded, see `astbench describe {row.name}`)"
    source = "" if row.source == "astbench" else f" [{row.source}]"
    paper = f" ({row.config.paper})" if row.config.paper else ""
    return f"  {row.name:<13} {row.summary}{paper}{source}"


def _task(task: RegisteredTask) -> str:
    if task.row is None:
        return f"  {task.name:<13} (from {task.source}; not loaded until --task={task.name})"
    source = "" if task.source == "astbench" else f" [{task.source}]"
    return f"  {task.name:<13} {task.summary} [sources: {', '.join(task.row.sources)}]{source}"


def _print_clashes(kind: str, claimed: dict[str, list[str]]) -> None:
    for name, sources in claimed.items():
        first, *others = sources
        what = f"{first}'s own, not {' and '.join(others)}'s" if first == "astbench" else "neither: uninstall one"
        print(f"  {name:<13} claimed by {' and by '.join(sources)}; --{kind}={name} is {what}")
