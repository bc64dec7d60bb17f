"""Adaptive depth: what share of a stack's operations each policy spends, and what that does to the score."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from astbench.errors import DataError
from astbench.tables.layout import Row, Table
from astbench.tables.pages import budgets
from astbench.tables.pages.sweeps import (
    NAMES,
    SCORES,
    Setting,
    by_score,
    chance,
    differences,
    metric_of,
    of_seeds,
    over,
    settings_of,
)
from astbench.tables.records import Group, Run
from astbench.tables.student import holm, p_value


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """The settings, the best first, each against the full depth on the same items, and what they took.

    Raises:
        DataError: a run without a depth policy, or none of the full depth.
    """
    metric = metric_of(group.name, group.runs)
    settings = by_score(settings_of(group.runs), metric)
    full = [one for one in settings if _said(one.runs[0])["name"] == "static" and _share(one) == 1]
    if len(full) != 1:
        raise DataError(f"results of {group.name} need one setting of the full depth, static; there are {len(full)}")
    gaps = {
        place: differences(one, full[0], SCORES[metric]) for place, one in enumerate(settings) if one is not full[0]
    }
    told = dict(zip(gaps, holm([p_value(gap) for gap in gaps.values()]), strict=True))
    rows = []
    for place, one in enumerate(settings):
        values = [run.metrics[metric] for run in one.runs]
        against = (over(gaps[place], metric), chance(told[place])) if place in gaps else ("", "")
        paths = sorted({int(_said(run)["paths"]) for run in one.runs})
        shown = (
            f"`{_said(one.runs[0])['name']}`{_options(one)}",
            f"{_share(one):.3f}",
            " to ".join(map(str, dict.fromkeys((paths[0], paths[-1])))),
            f"{fmean(values):.2f}",
            of_seeds(values),
            *against,
        )
        rows.append(Row(shown, one.runs))
    head = (
        "policy",
        "share of the layers' operations",
        "paths",
        f"{NAMES[metric]}, mean of the seeds",
        "95% of the mean (seeds)",
        "over the full depth (95% over the items)",
        "p (Holm)",
    )
    first = Table(f"{group.name}.scores", group.title, head, 1, tuple(rows))
    return [first, *budgets.tables(f"{group.name}.budget", group.title, settings, groups)]


def _said(run: Run) -> dict[str, Any]:
    found: dict[str, Any] | None = run.record.get("depth")
    if not found:
        raise DataError(f"{run.folder} ran without --depth: a table of kind depth cannot show it")
    return found


def _share(one: Setting) -> float:
    return fmean(float(_said(run)["share"]) for run in one.runs)


def _options(one: Setting) -> str:
    """What the label says after the attention, without the policy's name."""
    policy = str(_said(one.runs[0])["name"]).replace("_", " ")
    told = [part for part in one.label.split(", ")[1:] if part != f"depth {policy}"]
    return "".join(f", {part}" for part in told)
