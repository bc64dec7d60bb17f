"""Cost curves as a picture."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from astbench.bench import analysis

TITLES = {"forward": "forward", "training": "forward and backward, own losses included", "decode": "one token"}


def draw_curves(files: list[Path], cells: list[dict[str, Any]], title: str) -> None:
    """Seconds and bytes over length, a column a mode, both axes logarithmic; one picture in several formats.

    Dense rows are black, kernels alone dotted, peers dash-dotted. A dashed line stands where a curve crosses
    the fastest dense for good.
    """
    from matplotlib.figure import Figure

    modes = analysis.modes_of(cells)
    figure = Figure(figsize=(2 + 5.5 * len(modes), 9), layout="constrained")
    names = list(dict.fromkeys(c["attention"] for c in cells))
    panels = (("seconds a call", analysis.medians), ("peak bytes above the inputs", analysis.peaks))
    for row, (what, of) in enumerate(panels):
        for column, mode in enumerate(modes):
            axes = figure.add_subplot(2, len(modes), len(modes) * row + column + 1)
            drawn = False
            for number, name in enumerate(names):
                for variant in analysis.variants(cells, name, mode):
                    points, alone = of(cells, name, variant), variant != mode
                    style: dict[str, Any] = {
                        "color": f"C{number % 10}",
                        "linestyle": ("-.", ":")["@" not in variant] if alone else "-",
                    }
                    if analysis.is_dense(name):
                        style = {"color": "black", "linewidth": 2.5, "linestyle": ("-", "--", "-.", ":")[number % 4]}
                    drawn = drawn or bool(points)
                    label = f"{name} {variant.replace('_' + mode, '')}" if alone else name
                    axes.plot(list(points), list(points.values()), marker="o", markersize=3, label=label, **style)
                    crossing = analysis.crossover(cells, name, variant) if of is analysis.medians else None
                    if crossing:
                        axes.axvline(crossing, color=style["color"], linewidth=0.7, linestyle="--")
            axes.set_xscale("log", base=2)
            if drawn:
                axes.set_yscale("log")
            axes.set_xlabel("tokens")
            axes.set_ylabel(what)
            axes.set_title(TITLES[mode])
            axes.grid(alpha=0.3)
    legend = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(legend.values()), list(legend), loc="outside right upper")
    figure.suptitle(fill(title, 55 * len(modes)), x=0.02, horizontalalignment="left")  # beside the legend
    for file in files:
        figure.savefig(file)
