"""Analyses: what attentions kept, and the dense attention's mass on it. From `analysis.json` beside each record."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.records import Group, Run

FILE = "analysis.json"


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Means over layers and heads, most mass kept first.

    Raises:
        DataError: a record has no analysis beside it.
    """
    rows = []
    for run in sorted(group.runs, key=lambda r: -_mean(r, "mass")):
        kept, mass, best = (_mean(run, name) for name in ("kept", "mass", "best"))
        overlaps = [f"{_mean(run, f'overlap_of_{what}'):.2f}" for what in ("neighbours", "heads")]
        numbers = (f"{kept:.3f}", f"{mass:.3f}", f"{best:.3f}", f"{best - mass:.3f}", *overlaps)
        rows.append(Row((labels.described(run), *numbers), (run,)))
    head = (
        "attention",
        "keys kept",
        "mass on them",
        "best choice of as many blocks",
        "missed",
        "overlap, next token",
        "two heads",
    )
    return [Table(group.name, group.title, head, 1, tuple(rows))]


def _mean(run: Run, name: str) -> float:
    """Over layers and heads that have it."""
    found: list[float] = []
    for layer in run.beside(FILE)["layers"].values():
        value: Any = layer[name]
        found += [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    return fmean(found)
