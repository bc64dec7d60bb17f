"""Recall probes: associative recall by distance, needles by depth.

The models begin with induction heads built in, so each row also says what its model scores untrained: a run of one
step at a learning rate of next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.records import Group, Run

BEFORE = "untrained, %"
DECIDE = ("name", "block_size", "density", "min_blocks", "window")
"""Options of the recorded attentions that decide what the trained model may attend to."""


def mqar(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Associative recall: how AST's predictor learns, and what else there is."""
    rows = [_row(run, _recalled(run), group) for run in sorted(_trained(group), key=_grid)]
    head = (
        "attention",
        "pairs in tokens",
        "its choice learns by",
        "density",
        "accuracy, %",
        "at the farthest distance, %",
        BEFORE,
    )
    return [Table(group.name, group.title, head, 3, tuple(rows))]


def _trained(group: Group) -> list[Run]:
    return [run for run in group.runs if _learns(run)]


def _learns(run: Run) -> bool:
    return run.steps > 1


def _row(run: Run, cells: tuple[str, ...], group: Group) -> Row:
    """A trained run, and in the last column what the same model scored untrained; empty where nobody measured it."""
    found = [other for other in group.runs if not _learns(other) and _begins(run) == _begins(other)]
    before = f"{found[0].metrics['accuracy']:.1f}" if found else ""
    return Row((*cells, before), (run, *found[:1]))


def _begins(run: Run) -> tuple[Any, ...]:
    """What decides the score before training: the examples, the seed, and how the attention will choose."""
    shown = {key: run.attention.get(key) for key in DECIDE}
    return run.record["data"]["fingerprints"]["validation"], run.record["seed"], shown


def _grid(run: Run) -> tuple[int, int, float]:
    data = run.record["config"]["data"]
    return -data["length"], -data["num_pairs"], -run.metrics["accuracy"]


def _recalled(run: Run) -> tuple[str, ...]:
    options, data = run.attention, run.record["config"]["data"]
    ast = options["name"] == "ast"
    farthest = list(run.record["accuracy_by_distance"].values())[-1]
    return (
        labels.name(run),
        f"{data['num_pairs']} in {data['length']}",
        _teachers(options) if ast else "",
        f"{run.density:.3f}",
        f"{run.metrics['accuracy']:.1f}",
        f"{farthest['accuracy']:.1f}",
    )


def _teachers(options: Mapping[str, Any]) -> str:
    found = [str(options["estimator"]).replace("_", " ")] if options["estimator"] != "none" else []
    return " and ".join([*found, *(["distillation"] if options["distill_weight"] else [])]) or "nothing"


def needle(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Needles in a haystack, near the end of the text and farther back."""
    rows = [_row(run, _found(run), group) for run in sorted(_trained(group), key=lambda r: -r.metrics["accuracy"])]
    head = ("attention", "density", "accuracy, %", "needle in the first half, %", BEFORE)
    return [Table(group.name, group.title, head, 1, tuple(rows))]


def _found(run: Run) -> tuple[str, ...]:
    options = run.attention
    said = f", window {options['window']}" if options["name"] == "local" else ""
    if options["name"] == "ast" and options["density_start"] is None:
        said = ", sparse from the start"
    far = [cell["accuracy"] for depth, cell in run.record["accuracy_by_depth"].items() if int(depth) < 50]
    return labels.name(run) + said, f"{run.density:.3f}", f"{run.metrics['accuracy']:.1f}", f"{fmean(far):.1f}"
