"""Cost curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astbench.bench.layers import MODES, crossover, medians, peaks


def draw_curves(file: Path, cells: list[dict[str, Any]], title: str) -> None:
    """Seconds and bytes over length, forward and training, both axes logarithmic.

    `dense` is black; a dashed line stands where a curve crosses it for good.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasSVG(figure)
    names = list(dict.fromkeys(c["attention"] for c in cells))
    for row, (what, of) in enumerate((("seconds a call", medians), ("peak bytes above the inputs", peaks))):
        for column, mode in enumerate(MODES):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for number, name in enumerate(names):
                points = of(cells, name, mode)
                style = {"color": "black", "linewidth": 2.5} if name == "dense" else {"linestyle": "-:"[number % 2]}
                axes.plot(list(points), list(points.values()), marker="o", markersize=3, label=name, **style)
                crossing = crossover(cells, name, mode) if of is medians else None
                if crossing:
                    axes.axvline(crossing, color=axes.lines[-1].get_color(), linewidth=0.7, linestyle="--")
            axes.set_xscale("log", base=2)
            if any(of(cells, name, mode) for name in names):
                axes.set_yscale("log")
            axes.set_xlabel("tokens")
            axes.set_ylabel(what)
            axes.set_title("forward" if mode == "forward" else "forward and backward, own losses included")
            axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(file)
