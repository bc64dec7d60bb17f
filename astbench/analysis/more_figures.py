"""Pictures of drift over training and of language; the numbers behind them are in drift.json and linguistics.json."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from astbench.analysis.figures import new_figure, save
from astbench.runs.picture import layer_name


def draw_drift(found: dict[str, Any], folder: Path, title: str) -> list[str]:
    """Overlap with the weights before and with the last, keys kept and mass, over steps; by head from first to last."""
    steps = [checkpoint["step"] for checkpoint in found["checkpoints"]]
    rising = all(a < b for a, b in pairwise(steps))
    x = steps if rising else list(range(len(steps)))
    figure = new_figure(11.0, 7.0, title)
    panels = figure.subplots(2, 2)
    colours = _colours(len(found["layers"]))
    for axes, name, what in (
        (panels[0][0], "to_before", "overlap with the blocks\nunder the weights before"),
        (panels[0][1], "to_last", "overlap with the blocks\nunder the last weights"),
    ):
        for (path, layer), colour in zip(found["layers"].items(), colours, strict=True):
            known = [_mean(heads) for heads in layer[name]]
            axes.plot(x, known, marker="o", markersize=3, color=colour, label=layer_name(path))
        axes.set_ylim(0, 1.02)
        axes.set_ylabel(what, fontsize=8)
    if len(found["layers"]) <= 12:
        panels[0][0].legend(fontsize=6.5, loc="lower right")
    axes = panels[1][0]
    for name, what in (
        ("kept", "visible keys kept"),
        ("mass", "mass on them"),
        ("best", "mass on the best choice of as many blocks"),
    ):
        means = [fmean(value for layer in found["layers"].values() for value in layer[name][i]) for i in range(len(x))]
        axes.plot(x, means, marker="o", markersize=3, label=what)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share, mean over layers and heads", fontsize=8)
    axes.legend(fontsize=7)
    for axes in (panels[0][0], panels[0][1], panels[1][0]):
        axes.set_xlabel("optimizer steps" if rising else "checkpoint", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if not rising:
            axes.set_xticks(x, [f"step {step}" for step in steps], fontsize=7)
    _first_to_last(figure, panels[1][1], found)
    return save(figure, folder, "drift")


def _first_to_last(figure: Any, axes: Any, found: dict[str, Any]) -> None:
    rows = [[_number(head) for head in layer["to_last"][0]] for layer in found["layers"].values()]
    widest = max(map(len, rows))
    rows = [[*row, *[float("nan")] * (widest - len(row))] for row in rows]
    image = axes.imshow(rows, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.9)
    axes.set_title("overlap of the first weights' blocks with the last ones'", fontsize=8)
    axes.set_xlabel("head", fontsize=8)
    axes.set_xticks(range(0, widest, max(1, widest // 8)))
    step = max(1, len(rows) // 16)
    axes.set_yticks(range(0, len(rows), step))
    axes.set_yticklabels([layer_name(path) for path in found["layers"]][::step])
    axes.tick_params(labelsize=7)


def _colours(number: int) -> list[Any]:
    """From the first layer to the last."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, number - 1)) for i in range(number)]


def draw_language(found: dict[str, Any], folder: Path, title: str) -> list[str]:
    """Lift of each class with its interval, of what is kept and of the mass; and lift by layer."""
    rows = [(family, name, said) for family, classes in found["families"].items() for name, said in classes.items()]
    rows = [row for row in rows if row[2]["kept"][0] is not None]
    if not rows:
        return []
    figure = new_figure(11.0, 1.4 + 0.24 * len(rows), title)
    left, right = figure.subplots(1, 2, sharey=True)
    for shift, part, what in ((-0.15, "kept", "kept"), (0.15, "mass", "mass of dense attention")):
        places = [at for at, row in enumerate(rows) if row[2][part][0] is not None]
        values = [rows[at][2][part] for at in places]
        ends = [
            [0.0 if low is None else max(0.0, value - low) for value, low, _ in values],
            [0.0 if high is None else max(0.0, high - value) for value, _, high in values],
        ]
        left.errorbar(
            [value[0] for value in values], [at + shift for at in places], xerr=ends, fmt="o", markersize=3,
            linewidth=1, color="C0" if part == "kept" else "C1", label=what,
        )  # fmt: skip
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("times as much as other tokens at the same distances, in blocks that compete", fontsize=8)
    left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    left.set_yticks(range(len(rows)), [f"{name}  ({said['tokens']:,})" for _, name, said in rows], fontsize=7)
    left.set_ylim(len(rows) - 0.5, -0.5)
    layers = list(rows[0][2]["layers"])
    table = [[_number(said["layers"][path]) for path in layers] for _, _, said in rows]
    most = max([0.1, *(abs(value - 1) for row in table for value in row if value == value)])
    image = right.imshow(table, cmap="RdBu_r", vmin=1 - most, vmax=1 + most, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=right, shrink=0.6)
    right.set_title("kept, by layer", fontsize=8)
    step = max(1, len(layers) // 10)
    right.set_xticks(
        range(0, len(layers), step), [layer_name(path) for path in layers][::step], fontsize=7, rotation=45
    )
    before = None
    for at, (family, _, _) in enumerate(rows):
        if before is not None and family != before:
            for axes in (left, right):
                axes.axhline(at - 0.5, color="grey", linewidth=0.6)
        before = family
    left.tick_params(labelsize=7)
    left.grid(axis="x", alpha=0.3)
    return save(figure, folder, "linguistics")


def _mean(values: list[float | None] | None) -> float:
    known = [value for value in values or [] if value is not None]
    return fmean(known) if known else float("nan")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
