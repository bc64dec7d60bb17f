"""A sweep: settings of options over seeds, each against dense on the same items.

Seeds and items are two kinds of chance and are never pooled: one column has the interval of the mean over seeds, the
other that of the difference from dense over items, each item's difference being the mean over the seeds both have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from astbench.errors import DataError
from astbench.tables import labels
from astbench.tables.defaults import flatten
from astbench.tables.layout import Row, Table
from astbench.tables.pages import budgets, cells
from astbench.tables.records import Group, Run
from astbench.tables.student import holm, interval, p_value

SCORES = {"perplexity": "nll", "bleu": "bleu", "f1": "f1", "accuracy": "accuracy", "score": "score"}
"""Metric that heads a task's table, the first that a record has -> what its items hold of it."""

NAMES = {
    "perplexity": "perplexity a token",
    "bleu": "BLEU",
    "f1": "F1, %",
    "accuracy": "accuracy, %",
    "score": "score",
}
"""Of these metrics, as heads of columns."""

_LOWER = ("perplexity",)
_NO_SETTING = ("seed_everything", "trainer.threads")


@dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone."""

    label: str
    runs: tuple[Run, ...]

    @property
    def attention(self) -> str:
        """Its name."""
        return str(self.runs[0].attention["name"])

    @property
    def examples(self) -> str:
        """Fingerprint of what was scored."""
        data, split = self.runs[0].record["data"], str(self.runs[0].record.get("split", "validation"))
        return str(data.get("fingerprint") or (data.get("fingerprints") or {}).get(split))

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return fmean(run.metrics[metric] for run in self.runs)


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """The settings of a sweep, the best first, and what they took: two to four tables for each task.

    Raises:
        DataError: a setting has no dense one on the same examples to be compared with.
    """
    by_task = _by_task(group)
    if len(by_task) == 1:
        named: list[tuple[str, str, str, Sequence[Run]]] = [("scores", "budget", group.title, group.runs)]
    else:
        named = [(task, f"{task}-budget", f"{group.title}: {task}", runs) for task, runs in by_task.items()]
    return [
        table
        for scores, budget, title, runs in named
        for table in (
            _table(f"{group.name}.{scores}", title, runs),
            *budgets.tables(f"{group.name}.{budget}", title, _ordered(budget, runs), groups),
        )
    ]


def short(group: Group) -> Table:
    """A row for each attention that the table.yaml names, a column for each task.

    Raises:
        DataError: an attention has several settings in a task, or none in any.
    """
    columns: dict[str, dict[str, str]] = {}
    for task, runs in _by_task(group).items():
        metric = metric_of(f"{group.name}.short", runs)
        told: dict[str, str] = {}
        for one in settings_of(runs):
            if one.attention in told:
                raise DataError(f"the short table of {group.name} has no one row for {one.attention}: {one.label}")
            values = [run.metrics[metric] for run in one.runs]
            over_seeds = "" if len(values) < 2 else f" ± {interval(values)[1] - fmean(values):.1f}"
            density = cells.mean((run.density for run in one.runs), 2)
            told[one.attention] = f"{fmean(values):.1f}{over_seeds} ({density})"
        data = runs[0].record["config"]["data"]
        where = f"{task}, generated" if data.get("source") == "demo" else Path(str(data.get("path") or task)).name
        columns[f"{where}: {NAMES[metric]} (density)"] = told
    missing = [name for name in group.short if not any(name in column for column in columns.values())]
    if missing:
        raise DataError(f"the short table of {group.name} wants {', '.join(missing)}, and no run of it is there")
    rows = []
    for name in group.short:
        mine = tuple(run for run in group.runs if run.attention["name"] == name)
        rows.append(Row((f"`{name}`", *(column.get(name, "-") for column in columns.values())), mine))
    return Table(f"{group.name}.short", group.title, ("attention", *columns), 1, tuple(rows))


def _by_task(group: Group) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in group.runs:
        found.setdefault(str(run.record["config"]["task"]["name"]), []).append(run)
    return found


def _table(name: str, caption: str, runs: Sequence[Run]) -> Table:
    metric = metric_of(name, runs)
    settings = by_score(settings_of(runs), metric)
    has_dense = any(one.attention == "dense" for one in settings)
    others = [place for place, one in enumerate(settings) if has_dense and one.attention != "dense"]
    gaps = {i: differences(settings[i], _dense(settings[i], settings), SCORES[metric]) for i in others}
    told = dict(zip(gaps, holm([p_value(gap) for gap in gaps.values()]), strict=True))
    rank = ranks(settings, metric) if has_dense else [""] * len(settings)
    rows = []
    for place, one in enumerate(settings):
        values = [run.metrics[metric] for run in one.runs]
        against = (over(gaps[place], metric), chance(told[place])) if place in gaps else ("", "")
        density = cells.mean((run.density for run in one.runs), 3)
        shown = (one.label, density, f"{fmean(values):.2f}", of_seeds(values), *against, rank[place])
        rows.append(Row(shown, one.runs))
    head = (
        "setting",
        "density",
        f"{NAMES[metric]}, mean of the seeds",
        "95% of the mean (seeds)",
        "over dense (95% over the items)",
        "p (Holm)",
        "rank",
    )
    return Table(name, caption, head, 1, tuple(rows))


def of_seeds(values: Sequence[float]) -> str:
    """Half of Student's interval of the mean, and how many seeds there are."""
    half = "" if len(values) < 2 else f"± {interval(values)[1] - fmean(values):.2f} "
    return f"{half}({len(values)})"


def ranks(settings: Sequence[Setting], metric: str) -> list[str]:
    """One more than there are settings that are better beyond doubt, so that what cannot be told apart shares a rank.

    Each pair that scored the same items is tested on them, at 5% after Holm over all pairs. Ranks never fall from a
    better mean to a worse one.

    Args:
        settings: The best first.
        metric: That heads their table.
    """
    pairs = [(i, j) for j in range(len(settings)) for i in range(j) if settings[i].examples == settings[j].examples]
    gaps = [differences(settings[i], settings[j], SCORES[metric]) for i, j in pairs]
    apart = [pair for pair, p in zip(pairs, holm([p_value(gap) for gap in gaps]), strict=True) if p < 0.05]
    found: list[int] = []
    for place in range(len(settings)):
        better = sum(j == place for _, j in apart)
        found.append(max([1 + better, *found[-1:]]))
    return [str(rank) for rank in found]


def metric_of(name: str, runs: Sequence[Run]) -> str:
    """The metric that heads the table of these runs.

    Raises:
        DataError: their records hold none that is known.
    """
    metric = next((metric for metric in SCORES if metric in runs[0].metrics), None)
    if metric is None:
        raise DataError(f"records of {name} hold none of the metrics {', '.join(SCORES)}")
    return metric


def _ordered(name: str, runs: Sequence[Run]) -> list[Setting]:
    return by_score(settings_of(runs), metric_of(name, runs))


def by_score(settings: Sequence[Setting], metric: str) -> list[Setting]:
    """The best first."""
    return sorted(settings, key=lambda one: one.mean(metric) * (1 if metric in _LOWER else -1))


def _dense(one: Setting, settings: Sequence[Setting]) -> Setting:
    """The dense setting on the same examples that has the fewest other options besides."""
    found = [other for other in settings if other.attention == "dense" and other.examples == one.examples]
    if not found:
        raise DataError(f"{one.label} has no dense run on the same examples to compare with ({one.runs[0].folder})")
    mine = {key: value for key, value in _options(one.runs[0]).items() if not key.startswith("attention.")}
    return min(found, key=lambda other: sum(_options(other.runs[0]).get(key, v) != v for key, v in mine.items()))


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """Runs by everything but their seed, called by what differs within an attention."""
    flat = {run.name: _options(run) for run in runs}
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(flat[run.name], sort_keys=True, default=str), []).append(run)
    settings = []
    for same in found.values():
        first = same[0]
        others = [flat[run.name] for run in runs if run.attention["name"] == first.attention["name"]]
        options = flat[first.name]
        # an option that came after a record is no difference from it
        differ = [key for key, value in options.items() if any(other.get(key, value) != value for other in others)]
        seeds = [run.record["seed"] for run in same]
        if len(seeds) > len(set(seeds)):
            raise DataError(f"{first.folder.parent}: {', '.join(run.name for run in same)} repeat a seed")
        settings.append(Setting(", ".join([labels.name(first), *(_said(k, options[k]) for k in differ)]), tuple(same)))
    return settings


def _options(run: Run) -> dict[str, Any]:
    options = {**flatten(run.record["config"]), **run.entry.also}
    return {key: value for key, value in options.items() if key not in _NO_SETTING}


def _said(key: str, value: Any) -> str:
    """`density 0.25`, `estimator straight through`, `depth static`, `from runs/NAME`."""
    if key == "init_from":
        return f"from {value}" if value else "from scratch"
    text = (value if isinstance(value, str) else json.dumps(value)).replace("_", " ")
    return f"{key.removesuffix('.name').rpartition('.')[2].replace('_', ' ')} {text}"


def differences(one: Setting, other: Setting, item: str) -> list[float]:
    """Item by item, the mean over the seeds that both have; of all their seeds where they share none.

    Raises:
        DataError: they scored other items, or their items do not hold it.
    """
    mine, theirs = ({int(run.record["seed"]): run for run in setting.runs} for setting in (one, other))
    shared = sorted(mine.keys() & theirs.keys())
    sides = [[runs[seed].items() for seed in (shared or runs)] for runs in (mine, theirs)]
    names = sides[0][0].keys()
    for side, setting in zip(sides, (one, other), strict=True):
        for items, run in zip(side, setting.runs, strict=False):
            if items.keys() != names:
                raise DataError(f"{run.folder} scored other items than {one.runs[0].folder}")
            if not all(isinstance(row, dict) and item in row for row in items.values()):
                raise DataError(f"the items of {run.folder} hold no {item}")
    means = [{name: fmean(float(items[name][item]) for items in side) for name in names} for side in sides]
    return [means[0][name] - means[1][name] for name in names]


def over(gaps: Sequence[float], metric: str) -> str:
    """Mean of the items' differences, and its 95% interval; in percent for perplexities, whose items are logarithms."""
    ends = interval(gaps) if stdev(gaps) else (fmean(gaps),) * 2
    if metric in _LOWER:
        middle, low, high = (100 * math.expm1(x) for x in (fmean(gaps), *ends))
        return f"{middle:+.1f}% ({low:+.1f} to {high:+.1f})"
    return f"{fmean(gaps):+.1f} ({ends[0]:+.1f} to {ends[1]:+.1f})"


def chance(p: float) -> str:
    """A p-value as a cell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
