"""`astbench list`: everything that has a name."""

from __future__ import annotations

import sys

from astbench.backbones.presets import PRESETS
from astbench.cli.names import read_names
from astbench.errors import ConfigError
from astbench.tasks import TASKS
from astbench_registry import registered
from astbench_registry.registry import Registered, clashes

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
        print("usage: astbench list [--plugins=FILE.py|MODULE]\n\nEvery attention, task and backbone preset by name.")
        return 0
    if unknown := [*line.others(), *line.words]:
        raise ConfigError(f"astbench list takes no {unknown[0]}")
    print("attention       patterns     decode gqa  params layout  paper, or where it comes from")
    for row in registered().values():
        print(_attention(row))
    for name, sources in clashes().items():
        first, *others = sources
        what = f"{first}'s own, not {' and '.join(others)}'s" if first == "astbench" else "neither: uninstall one"
        print(f"  {name:<13} claimed by {' and by '.join(sources)}; --attention={name} is {what}")
    print("\n  patterns: bi bidirectional self, ca causal self (ca*: not strictly causal), xb/xc cross-attention of")
    print("  a bidirectional/causal model; params: has parameters of its own; layout: reports its key blocks")
    print("\ntask")
    for task in TASKS.values():
        print(f"  {task.name:<13} {task.summary} [sources: {', '.join(task.sources)}]")
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
