"""Recall probes: associative recall by distance, needles by depth."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.records import Group, Run


def mqar(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Associative recall: how AST's predictor learns, and what else there is."""
    rows = [Row(_recalled(run), (run,)) for run in sorted(group.runs, key=_grid)]
    head = (
        "attention",
        "pairs in tokens",
        "estimator",
        "distilled",
        "density",
        "accuracy, %",
        "at the farthest distance, %",
    )
    return [Table(group.name, group.title, head, 4, tuple(rows))]


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
        str(options["estimator"]).replace("_", " ") if ast else "",
        ("yes" if options["distill_weight"] else "no") if ast else "",
        f"{run.density:.3f}",
        f"{run.metrics['accuracy']:.1f}",
        f"{farthest['accuracy']:.1f}",
    )


def needle(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Needles in a haystack, near the end of the text and farther back."""
    rows = [Row(_found(run), (run,)) for run in sorted(group.runs, key=lambda r: -r.metrics["accuracy"])]
    head = ("attention", "density", "accuracy, %", "needle in the first half, %")
    return [Table(group.name, group.title, head, 1, tuple(rows))]


def _found(run: Run) -> tuple[str, ...]:
    options = run.attention
    said = f", window {options['window']}" if options["name"] == "local" else ""
    if options["name"] == "ast" and options["density_start"] is None:
        said = ", sparse from the start"
    far = [cell["accuracy"] for depth, cell in run.record["accuracy_by_depth"].items() if int(depth) < 50]
    return labels.name(run) + said, f"{run.density:.3f}", f"{run.metrics['accuracy']:.1f}", f"{fmean(far):.1f}"
