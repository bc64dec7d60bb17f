"""What the settings of a sweep took, side by side: budgets that a fair comparison holds equal, or says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from astbench.bench import analysis
from astbench.tables.layout import Row, Table
from astbench.tables.pages import cells
from astbench.tables.records import Group, Run
from astbench.tasks import find_task
from astbench_registry.registry import make_config

if TYPE_CHECKING:
    from astbench.tables.pages.sweeps import Setting

Column = Callable[["Setting"], str]

_FREE = ("backend",)
"""Options that change the kernel, not what is computed."""


def tables(name: str, caption: str, settings: Sequence[Setting], groups: Mapping[str, Group]) -> list[Table]:
    """Means over the seeds; what a record does not hold is left empty.

    The second and third table are there where some record holds what they show: operations (of all seeds' runs, counted
    as :mod:`astbench.backbones.flop_count` says); and, where a bench of the same attention with the same options is
    among the groups, how fast its layer is beside the fastest dense one.
    """
    parts = (
        (name, f"{caption}: what it took", _TOOK),
        (f"{name}-operations", f"{caption}: operations, TFLOP", _OPERATIONS),
        (f"{name}-speed", f"{caption}: the layer's speed", _speeds(groups)),
    )
    found = []
    for called, said, columns in parts:
        heads = {h: c for h, c in columns.items() if h in _ALWAYS or any(map(c, settings))}
        rows = [Row((one.label, *(column(one) for column in heads.values())), one.runs) for one in settings]
        found += [Table(called, said, ("setting", *heads), 1, tuple(rows))] if heads else []
    return found


def _parameters(which: str) -> Column:
    def column(one: Setting) -> str:
        found = [run.record["parameters"][which] for run in one.runs if "parameters" in run.record]
        return cells.thousands(found[0]) if found else ""

    return column


def _trained(one: Setting) -> list[Mapping[str, Any]]:
    found = (run.record.get("train", {}) for run in one.runs)
    return [train for train in found if "wall_seconds" in train]


def _mean(values: Iterable[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return cells.mean(known, digits) if known else ""


_TOOK: dict[str, Column] = {
    "parameters": _parameters("total"),
    "the attention's own": _parameters("attention"),
    "steps": lambda one: cells.thousands(one.runs[0].steps) if _trained(one) else "",
    "training, s": lambda one: _mean((train["wall_seconds"] for train in _trained(one)), 0),
    "peak memory, MiB": lambda one: _mean((run.memory and run.memory / 2**20 for run in one.runs), 0),
    "tokens trained on": lambda one: _thousands(_counted(one, "training", "tokens")),
}
_ALWAYS = tuple(_TOOK)[:5]  # tokens came after the first records
_OPERATIONS: dict[str, Column] = {
    "training": lambda one: _tera(_all(one, "training")),
    "training: the attention's": lambda one: _tera(_counted(one, "training", "attention")),
    "training: choosing": lambda one: _tera(_counted(one, "training", "choosing")),
    "evaluation": lambda one: _tera(_all(one, "evaluation")),
    "evaluation: the attention's": lambda one: _tera(_counted(one, "evaluation", "attention")),
}


def _speeds(groups: Mapping[str, Group]) -> dict[str, Column]:
    return {
        "layer's training step: times as fast as dense": lambda one: _speed(one, groups),
        "faster from, tokens": lambda one: _crossover(one, groups),
        "slower at, tokens": lambda one: _losing(one, groups),
    }


def _counted(one: Setting, part: str, what: str) -> list[float]:
    """Of every seed; nothing where one of them does not say."""
    found = [run.flops(part).get(what) for run in one.runs]
    return [] if any(value is None for value in found) else [float(value) for value in found if value is not None]


def _all(one: Setting, part: str) -> list[float]:
    model, attention = (_counted(one, part, what) for what in ("model", "attention"))
    return [m + a for m, a in zip(model, attention, strict=False)]


def _tera(values: Sequence[float]) -> str:
    return f"{fmean(values) / 1e12:.3g}" if values else ""


def _thousands(values: Sequence[float]) -> str:
    return cells.thousands(round(fmean(values))) if values else ""


def _speed(one: Setting, groups: Mapping[str, Group]) -> str:
    bench = benched(one.runs[0], groups)
    found = analysis.speedup(*bench, "training") if bench else {}
    return f"{found[max(found)]:.2f} at {max(found):,}" if found else ""


def _crossover(one: Setting, groups: Mapping[str, Group]) -> str:
    bench = benched(one.runs[0], groups)
    return cells.crossover(*bench, "training") if bench else ""


def _losing(one: Setting, groups: Mapping[str, Group]) -> str:
    bench = benched(one.runs[0], groups)
    return cells.losing(*bench, "training") if bench else ""


def benched(run: Run, groups: Mapping[str, Group]) -> tuple[list[analysis.Cell], str] | None:
    """The cells of a bench of the attention as it ran, and what they call it; None without one.

    As it ran: with all its options, those of learning too, under a mask of the same kind.
    """
    name = str(run.attention["name"])
    if analysis.is_dense(name):
        return None
    own = _options(name, {key: value for key, value in run.attention.items() if key != "name"})
    for bench in (bench for group in groups.values() for bench in group.runs if bench.record["command"] == "bench"):
        config = bench.record["config"]
        given = (config.get("options") or {}).get(name) or {}
        for density in [None, *(config.get("densities") or [])]:
            row = name if density is None else f"{name} {density:g}"
            there = any(cell["attention"] == row for cell in bench.record["cells"])
            more = {} if density is None else {"density": density}
            same = own is not None and _options(name, {**given, **more}) == own
            if there and same and config["pattern"] in _patterns(run):
                return bench.record["cells"], row
    return None


def _options(name: str, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """All of them; None where this version has others."""
    try:
        found = asdict(make_config(name, given))
    except (TypeError, ValueError):
        return None
    return {key: value for key, value in found.items() if key not in _FREE}


def _patterns(run: Run) -> set[str]:
    """Kinds of masks that the run's attention worked under."""
    attached = run.record.get("attached") or {}
    if "patterns" in attached:
        return set(attached["patterns"])
    task = run.record["config"]["task"]  # of a record from before they were written down
    module, _, config = find_task(str(task["name"])).load()
    given = {key: value for key, value in task.items() if key != "name"}
    return set(module.patterns(config(**given)).values())
