"""Runs at several depths as a picture, SVG and PNG, with the numbers behind it in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from astbench.analysis.figures import new_figure, save
from astbench.files.writing import write_text

NAME = "depth"


@dataclass(frozen=True)
class Point:
    """A run, or the oracle: its share of the operations, how much is right, 0 to 1, and what it is called."""

    run: str
    policy: str
    share: float
    right: float


@dataclass(frozen=True)
class Group:
    """Items of a run with about the same predicted complexity.

    Attributes:
        run: Its name.
        number: Of the group, the simplest items first.
        items: How many they are.
        complexity: Predicted, mean.
        layers: That they went through, mean.
        right: How much of them is right, 0 to 1.
    """

    run: str
    number: int
    items: int
    complexity: float
    layers: float
    right: float


def draw(points: Sequence[Point], groups: Sequence[Group], folder: Path) -> list[str]:
    """Write the picture and both tables; the files' names."""
    panels = 2 if groups else 1
    figure = new_figure(0.6 + 4.2 * panels, 3.6, "Depth: what it costs and what it brings")
    axes = figure.add_subplot(1, panels, 1)
    for number, policy in enumerate(dict.fromkeys(point.policy for point in points)):
        own = [point for point in points if point.policy == policy]
        marker = "*" if policy == "oracle" else "osD^vPX<>"[number % 9]
        axes.plot([p.share for p in own], [100 * p.right for p in own], marker, label=policy, markersize=7, alpha=0.8)
    axes.set_xlabel("share of the layers' operations", fontsize=8)
    axes.set_ylabel("right, %", fontsize=8)
    axes.legend(fontsize=7)
    axes.tick_params(labelsize=7)
    if groups:
        axes = figure.add_subplot(1, 2, 2)
        for run in dict.fromkeys(group.run for group in groups):
            own_groups = [group for group in groups if group.run == run]
            axes.plot([g.complexity for g in own_groups], [g.layers for g in own_groups], "o-", label=run, markersize=4)
        axes.set_xlabel("predicted complexity, mean of a group of items", fontsize=8)
        axes.set_ylabel("layers of an item, mean", fontsize=8)
        axes.legend(fontsize=7)
        axes.tick_params(labelsize=7)
    files = save(figure, folder, NAME)
    files.append(_table(folder / f"{NAME}.csv", points))
    if groups:
        files.append(_table(folder / f"{NAME}-groups.csv", groups))
    return files


def _table(file: Path, rows: Sequence[Point] | Sequence[Group]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(vars(rows[0]))
    writer.writerows([list(vars(row).values()) for row in rows])
    write_text(file, text.getvalue())
    return file.name
