"""Language models: perplexity without training, tuned against dense, and from scratch over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from astbench.errors import DataError
from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.pages import cells
from astbench.tables.records import Group, Run
from astbench.tables.student import interval
from astbench_registry.registry import config_class

TOLD = ("block_size", "budget", "rest", "sub_blocks", "patterns", "coarse_stride")
"""Options that a short table tells settings apart by."""


def untrained(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """A pretrained model under several attentions, the best first."""
    rows = [Row(_untrained(run), (run,)) for run in sorted(group.runs, key=lambda r: r.metrics["perplexity"])]
    head = ("attention", "query tokens that share a list", "density asked for", "density", "perplexity a token")
    return [Table(group.name, group.title, head, 1, tuple(rows))]


def _untrained(run: Run) -> tuple[str, ...]:
    options = run.attention
    return (
        labels.name(run) + (f", window {options['window']}" if "window" in options else ""),
        str(options.get("query_group", "")),
        f"{options['density']:g}" if "density" in options else "",
        f"{run.density:.3f}",
        f"{run.metrics['perplexity']:.2f}",
    )


def over_dense(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Untrained, only the predictors taught, all weights tuned: each against dense on the same windows.

    Raises:
        DataError: dense is missing, or scored other windows.
    """
    dense = {labels.learned(run): run for run in group.runs if run.attention["name"] == "dense"}
    for needed in ("nothing", "all weights"):
        if needed not in dense:
            raise DataError(f"results of {group.name} hold no dense run in which {needed} learned, to compare with")
    rows = []
    for run in sorted(group.runs, key=_stage):
        what = labels.learned(run)
        other = dense["all weights" if what == "all weights" else "nothing"]
        against = "" if run is other else over(run, other)
        numbers = (f"{run.density:.3f}", f"{run.metrics['perplexity']:.2f}", against)
        rows.append(Row((labels.described(run), what, *numbers), (run,)))
    head = (
        "attention",
        "what learned",
        "density",
        "perplexity a token",
        "over dense (95%, Student over the windows)",
    )
    return [Table(group.name, group.title, head, 2, tuple(rows))]


def tiles(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """A pretrained model under attentions whose rows keep so many blocks, against dense; the best first.

    Raises:
        DataError: dense is missing, or scored other windows.
    """
    dense = next((run for run in group.runs if run.attention["name"] == "dense"), None)
    if dense is None:
        raise DataError(f"results of {group.name} hold no dense run to compare with")
    rows = []
    for run in sorted(group.runs, key=lambda r: (r is not dense, r.metrics["perplexity"])):
        kept = run.attention.get("top_k") if run.attention.get("budget", "fixed") == "fixed" else None
        name = labels.described(run) + (f", {kept} blocks a row" if kept else "")
        computed = "" if run.tiles is None else f"{run.tiles:.3f}"
        against = "" if run is dense else over(run, dense)
        rows.append(Row((name, f"{run.density:.3f}", computed, f"{run.metrics['perplexity']:.2f}", against), (run,)))
    head = ("attention", "density", "tiles", "perplexity a token", "over dense (95%, Student over the windows)")
    return [Table(group.name, group.title, head, 1, tuple(rows))]


def short(group: Group) -> Table:
    """The attentions that the table.yaml names, trained in all weights; of several settings best, default and worst.

    Raises:
        DataError: no such run of one of them.
    """
    rows = []
    for name in group.short:
        runs = [r for r in group.runs if r.attention["name"] == name and labels.learned(r) == "all weights"]
        if not runs:
            raise DataError(f"the short table of {group.name} wants {name} tuned, and no run of it is there")
        rows += _told_apart(sorted(runs, key=lambda r: float(r.metrics["perplexity"])))
    dense = next(run for label, run in rows if run.attention["name"] == "dense")
    rows.sort(key=lambda row: (row[1] is not dense, float(row[1].metrics["perplexity"])))
    table = [
        Row(
            (
                label,
                f"{run.density:.3f}",
                f"{run.metrics['perplexity']:.2f}",
                "" if run is dense else over(run, dense),
            ),
            (run,),
        )
        for label, run in rows
    ]
    head = ("attention", "density", "perplexity", "over dense (95%)")
    return Table(f"{group.name}.short", group.title, head, 1, tuple(table))


def _told_apart(runs: list[Run]) -> list[tuple[str, Run]]:
    """Labels of one attention's runs, the best first: the only one, or best, default options and worst."""
    if len(runs) == 1:
        return [(labels.name(runs[0]), runs[0])]
    chosen = {"best": runs[0], "defaults": _default(runs), "worst": runs[-1]}
    return [(f"`{run.attention['name']}`, {what}: `{_told(run)}`", run) for what, run in chosen.items()]


def _told(run: Run) -> str:
    """The options that tell settings apart: the block's size, and others that are not the default."""
    options, default = run.attention, config_class(str(run.attention["name"]))().as_dict()
    told = [name for name in TOLD if name in options and (name == "block_size" or options[name] != default[name])]
    return " ".join(f"{name}={str(options[name]).lower()}" for name in told)


def _default(runs: list[Run]) -> Run:
    """The run whose density is the default one, and of which nothing is to be said beside its name."""
    default = config_class(str(runs[0].attention["name"]))()
    plain = [r for r in runs if labels.described(r) == f"`{r.attention['name']}`"]
    return next(r for r in plain if r.attention["density"] == getattr(default, "density", None))


def _stage(run: Run) -> tuple[int, float]:
    return ("nothing", "predictors", "all weights").index(labels.learned(run)), run.metrics["perplexity"]


def over(run: Run, other: Run) -> str:
    """By how much perplexity lies above another run's, with Student's interval over the windows both scored.

    Raises:
        DataError: they scored different windows.
    """
    mine, theirs = run.items(), other.items()
    if mine.keys() != theirs.keys():
        raise DataError(f"{run.folder} and {other.folder} scored different windows")
    gaps = [mine[window]["nll"] - theirs[window]["nll"] for window in mine]
    middle, low, high = (100 * math.expm1(x) for x in (fmean(gaps), *interval(gaps)))
    return f"{middle:+.1f}% ({low:+.1f} to {high:+.1f})"


def seeds(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """From scratch, all seeds of the same options in one row, the best mean first."""
    found: dict[str, list[Run]] = {}
    for run in group.runs:
        found.setdefault(labels.described(run), []).append(run)
    rows = []
    for name, runs in sorted(found.items(), key=lambda one: fmean(r.metrics["perplexity"] for r in one[1])):
        perplexity = [run.metrics["perplexity"] for run in runs]
        own = cells.thousands(runs[0].record["parameters"]["attention"])
        density = cells.mean((run.density for run in runs), 3)
        rows.append(Row((name, density, own, cells.mean(perplexity), cells.spread(perplexity)), tuple(runs)))
    head = (
        "attention",
        "density",
        "parameters of its own",
        "perplexity a token, mean of the seeds",
        "seeds (lowest to highest)",
    )
    return [Table(group.name, group.title, head, 1, tuple(rows))]
