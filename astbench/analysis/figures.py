"""An analysis as pictures, each as SVG and PNG; the numbers behind them are in analysis.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astbench.analysis.tokens import FAMILIES
from astbench.runs.picture import layer_name

_OF_HEADS = (
    ("kept", "share of visible keys kept", "magma_r"),
    ("mass", "mass on them", "viridis"),
    ("missed", "mass that the best choice\nof as many blocks adds", "inferno_r"),
    ("bits", "entropy of dense attention, bits", "cividis"),
)


def draw(found: dict[str, Any], folder: Path, title: str) -> list[str]:
    """Write all pictures; their names."""
    names = []
    for name, figure in (
        ("heads", _heads(found, title)),
        *([("distance", _distance(found, title))] if found["distances"] else []),
        *([("place", _place(found, title))] if found["by_place"]["kept"] else []),
        *([("tokens", _tokens(found, title))] if found["by_token"] else []),
    ):
        names += save(figure, folder, name)
    return names


def save(figure: Any, folder: Path, name: str) -> list[str]:
    """Write a picture as SVG and as PNG; the files' names."""
    files = [f"{name}.{kind}" for kind in ("svg", "png")]
    for file in files:
        figure.savefig(folder / file, dpi=110)
    return files


def new_figure(width: float, height: float, title: str) -> Any:
    """An empty one, of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def _heads(found: dict[str, Any], title: str) -> Any:
    """Layers down, heads across."""
    layers = found["layers"]
    widest = max(len(layer["kept"]) for layer in layers.values())
    height = 1.6 + 0.22 * len(layers)
    figure = new_figure(2.0 + len(_OF_HEADS) * max(2.2, 0.25 * widest), max(2.8, height), title)
    for number, (name, what, colours) in enumerate(_OF_HEADS):
        rows = [_of_heads(layer, name) for layer in layers.values()]
        rows = [[*row, *[float("nan")] * (widest - len(row))] for row in rows]
        axes = figure.add_subplot(1, len(_OF_HEADS), number + 1)
        largest = max((value for row in rows for value in row if value == value), default=0.0)
        low, high = 0.0, max(0.05, largest) if name in ("bits", "missed") else 1.0
        image = axes.imshow(rows, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.9)
        axes.set_title(what, fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        axes.set_xticks(range(0, widest, max(1, widest // 8)))
        axes.tick_params(labelsize=7)
        step = max(1, len(rows) // 16)
        axes.set_yticks(range(0, len(rows), step))
        labels = [layer_name(path) for path in layers][::step]
        axes.set_yticklabels(labels if number == 0 else [])
    return figure


def _of_heads(layer: dict[str, Any], name: str) -> list[float]:
    if name == "missed":
        return [best - mass for best, mass in zip(layer["best"], layer["mass"], strict=True)]
    return list(layer[name])


def _distance(found: dict[str, Any], title: str) -> Any:
    figure = new_figure(6.4, 4.6, title)
    known = [i for i, kept in enumerate(found["kept_by_distance"]) if kept is not None]
    assert known, "asked for only where there are distances"
    labels = [_bin(found["distances"], i) for i in known]
    for number, (name, what) in enumerate(
        (("kept_by_distance", "share of visible keys kept"), ("mass_by_distance", "share of the mass"))
    ):
        axes = figure.add_subplot(2, 1, number + 1)
        axes.bar(range(len(known)), [found[name][i] for i in known], color=f"C{number}")
        axes.set_ylabel(what, fontsize=8)
        axes.set_xticks(range(len(known)))
        axes.set_xticklabels(labels if number else [], rotation=45, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("tokens between query and key", fontsize=8)
    return figure


def _bin(starts: list[int], number: int) -> str:
    start = starts[number]
    if number == len(starts) - 1:
        return f"{start:,}+"
    end = starts[number + 1] - 1
    return f"{start:,}" if end == start else f"{start:,}-{end:,}"


def _place(found: dict[str, Any], title: str) -> Any:
    figure = new_figure(6.4, 4.6, title)
    by_place = found["by_place"]
    parts = len(by_place["kept"])
    middle = [(part + 0.5) / parts for part in range(parts)]
    axes = figure.add_subplot(2, 1, 1)
    for name, what in (
        ("kept", "visible keys kept"),
        ("mass", "mass on them"),
        ("best", "mass on the best choice of as many blocks"),
    ):
        axes.plot(middle, _plotted(by_place[name]), marker="o", markersize=3, label=what)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share", fontsize=8)
    axes.legend(fontsize=7)
    below = figure.add_subplot(2, 1, 2)
    below.plot(middle, _plotted(by_place["bits"]), marker="o", markersize=3, color="C3")
    below.set_ylabel("entropy, bits", fontsize=8)
    below.set_ylim(0, 1.1 * max([0.1, *(value for value in by_place["bits"] if value is not None)]))
    for panel in (axes, below):
        panel.set_xlim(0, 1)
    below.set_xlabel("place in the sequence", fontsize=8)
    for panel in (axes, below):
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    return figure


def _plotted(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _tokens(found: dict[str, Any], title: str) -> Any:
    families = [family for family in FAMILIES if family in found["by_token"]]
    figure = new_figure(11.0, 1.6 + 2.0 * len(families), title)
    panels = (
        (("query_kept", "as query: keys kept"), ("query_mass", "as query: mass on them")),
        (
            ("key_kept", "as key: how often kept"),
            ("key_mass", "as key: share of the mass"),
            ("share", "share of all tokens"),
        ),
    )
    for row, family in enumerate(families):
        classes = {name: facts for name, facts in found["by_token"][family].items() if facts["share"]}
        for column, parts in enumerate(panels):
            axes = figure.add_subplot(len(families), 2, 2 * row + column + 1)
            wide = 0.8 / len(parts)
            for number, (part, what) in enumerate(parts):
                places = [i + number * wide for i in range(len(classes))]
                values = _plotted([facts[part] for facts in classes.values()])
                axes.barh(places, values, wide, label=what, color=f"C{number + 2 * column}")
            axes.set_xlim(0, 1)
            axes.set_yticks([i + 0.4 - wide / 2 for i in range(len(classes))])
            axes.set_yticklabels(list(classes) if column == 0 else [])
            axes.invert_yaxis()
            axes.tick_params(labelsize=7)
            axes.grid(axis="x", alpha=0.3)
            if row == 0:
                axes.legend(fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    return figure
