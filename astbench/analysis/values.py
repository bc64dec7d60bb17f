"""How attention values are distributed: by layer and head, on a log axis; what pruning could take, and entropy.

The study of Ji et al. 2021 (arXiv 2106.01335), "the full range of typical attention values", for any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astbench.analysis.figures import new_figure, save
from astbench.runs.picture import layer_name
from astbench_registry.transforms.values import BINS, DECADES, PER_DECADE, ValueCounts

LIMITS = tuple(10.0**-n for n in range(1, 11))
"""Values below which shares are told."""

SHOWN = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
"""Those of them that are printed."""

WIDTH = 10
"""Bins of a count that one bin of a histogram holds: ten of these in a decade."""


def study(counts: Mapping[str, ValueCounts]) -> dict[str, Any]:
    """Everything as plain data.

    `edges` are the histograms' in powers of ten; the first number of a histogram is the share below the first edge,
    zero among it. Shares are of visible pairs, entropies means over the rows that see something, in bits.

    Args:
        counts: Of each layer, by its path.
    """
    every = ValueCounts.sum(list(counts.values()))
    rows = sum(one.rows * len(one.counts) for one in counts.values())
    bits = sum(float(one.entropy.sum()) for one in counts.values()) / max(1, rows)
    return {
        "pairs": int(every.total.sum()),
        "edges": [round(-DECADES + n * WIDTH / PER_DECADE, 6) for n in range(BINS // WIDTH + 1)],
        "all": {
            "histogram": _histogram(every)[0],
            "below": {f"{limit:g}": round(float(every.share_below(limit)[0]), 6) for limit in LIMITS},
            "bits": round(bits, 6),
        },
        "layers": {
            path: {
                "histogram": _histogram(one),
                "below": {f"{limit:g}": _rounded(one.share_below(limit)) for limit in LIMITS},
                "bits": _rounded(one.entropy / max(1, one.rows)),
            }
            for path, one in counts.items()
        },
    }


def _histogram(counts: ValueCounts) -> list[list[float]]:
    """By head: the share below the first edge, then of each bin."""
    bins = counts.counts[:, 1:].unflatten(1, (-1, WIDTH)).sum(-1)
    shares = torch.cat([counts.counts[:, :1], bins], 1).double() / counts.total.clamp(min=1)[:, None]
    return [_rounded(row) for row in shares]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def draw_values(found: dict[str, Any], folder: Path, title: str) -> list[str]:
    """Write the pictures, each as SVG and PNG; their names."""
    names: list[str] = []
    for name, figure in (("values", _distribution(found, title)), ("values-heads", _heads(found, title))):
        names += save(figure, folder, name)
    return names


def _distribution(found: dict[str, Any], title: str) -> Any:
    """The histogram of each layer in a colour of its own, and the share below each value."""
    figure = new_figure(7.2, 6.0, title)
    middle = [(low + high) / 2 for low, high in zip(found["edges"][:-1], found["edges"][1:], strict=True)]
    histograms, below = figure.add_subplot(2, 1, 1), figure.add_subplot(2, 1, 2)
    layers = list(found["layers"].values())
    for number, layer in enumerate(layers):
        colour = (number / max(1, len(layers) - 1), 0.2, 1 - number / max(1, len(layers) - 1), 0.5)
        mean = [sum(column) / len(column) for column in zip(*layer["histogram"], strict=True)]
        histograms.plot(middle, mean[1:], color=colour, linewidth=0.8)
        below.plot(found["edges"], _cumulative(mean), color=colour, linewidth=0.8)
    whole = found["all"]["histogram"]
    histograms.plot(middle, whole[1:], color="black", linewidth=1.6, label="all layers")
    below.plot(found["edges"], _cumulative(whole), color="black", linewidth=1.6, label="all layers")
    histograms.set_ylabel("share of the visible pairs,\na tenth of a decade each", fontsize=8)
    below.set_ylabel("share below", fontsize=8)
    below.set_ylim(0, 1.02)
    below.set_xlabel("attention value, power of ten; layers from the first (blue) to the last (red)", fontsize=8)
    for axes in (histograms, below):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _cumulative(histogram: list[float]) -> list[float]:
    found, running = [], 0.0
    for share in histogram:
        running += share
        found.append(running)
    return found


def _heads(found: dict[str, Any], title: str) -> Any:
    """Every head's histogram as a row of colours, layer by layer; its share below 0.001, and its entropy."""
    layers = found["layers"]
    rows = [row for layer in layers.values() for row in layer["histogram"]]
    shares = [[math.log10(max(share, 1e-6)) for share in row[1:]] for row in rows]
    figure = new_figure(9.0, max(3.2, 1.6 + 0.05 * len(rows)), title)
    grid = figure.add_gridspec(1, 3, width_ratios=(5, 1, 1))
    axes = figure.add_subplot(grid[0, 0])
    span = (found["edges"][0], found["edges"][-1], len(rows), 0)
    image = axes.imshow(shares, aspect="auto", cmap="magma", interpolation="nearest", extent=span)
    figure.colorbar(image, ax=axes, shrink=0.9, label="share, power of ten")
    axes.set_xlabel("attention value, power of ten", fontsize=8)
    ends = list(accumulate(len(layer["histogram"]) for layer in layers.values()))
    step = max(1, len(ends) // 16)
    middles = [(begin + end) / 2 for begin, end in pairwise([0, *ends])]
    axes.set_yticks(middles[::step], [layer_name(path) for path in layers][::step])
    for end in ends[:-1]:
        axes.axhline(end, color="white", linewidth=0.4)
    axes.tick_params(labelsize=7)
    widest = max(len(layer["bits"]) for layer in layers.values())
    for place, (what, values) in enumerate(
        (
            ("share below 0.001", [layer["below"]["0.001"] for layer in layers.values()]),
            ("entropy, bits", [layer["bits"] for layer in layers.values()]),
        )
    ):
        panel = figure.add_subplot(grid[0, 1 + place])
        table = [[*row, *[float("nan")] * (widest - len(row))] for row in values]
        shown = panel.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
        figure.colorbar(shown, ax=panel, shrink=0.9)
        panel.set_title(what, fontsize=8)
        panel.set_xlabel("head", fontsize=8)
        panel.set_yticks(range(0, len(values), step))
        panel.set_yticklabels([])
        panel.tick_params(labelsize=7)
    return figure
