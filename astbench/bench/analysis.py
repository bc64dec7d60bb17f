"""What follows from measured cells: medians, R, throughput, crossovers. Plain numbers, no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from astbench.bench.config import MODES

KERNEL = {"forward": "kernel", "training": "kernel_training", "decode": "kernel_decode"}
"""A mode of the layer -> the same of the block-sparse kernel alone, on lists that are there already.

Followed by `@` and a backend's name it is a peer's, on the same lists.
"""
GROWTH_FROM = 2048
"""Exponents are fitted from this length on; below, what does not grow still shows."""

Cell = dict[str, Any]


def is_dense(name: str) -> bool:
    """Rows that others are compared with: dense attention, by whatever kernel."""
    return name == "dense" or name.startswith("dense:")


def layer_mode(mode: str) -> str:
    """The mode of the layer that one of the kernel or of a peer belongs to."""
    whole = mode.partition("@")[0]
    return {kernel: layer for layer, kernel in KERNEL.items()}.get(whole, whole)


def asked(cell: Cell) -> list[str]:
    """The modes that the cell was to be measured in; records before that was written down say it by what they hold."""
    return list(cell["asked"]) if "asked" in cell else [*MODES[:2], *(m for m in KERNEL.values() if m in cell)]


def modes_of(cells: list[Cell]) -> list[str]:
    """Layer modes that some cell was to be measured in, itself or its kernel."""
    found = {layer_mode(mode) for cell in cells for mode in asked(cell)}
    return [mode for mode in MODES if mode in found]


def variants(cells: list[Cell], name: str, mode: str) -> list[str]:
    """Of one attention: the layer's mode, its kernel's and the peers', as far as they were asked for."""
    found = dict.fromkeys(m for c in cells if c["attention"] == name for m in asked(c))
    return [m for m in found if layer_mode(m) == mode]


def summary(cell: Cell, mode: str) -> dict[str, Any]:
    """Median and quartiles in seconds, count, peak bytes, work done a second; or `why` there is none.

    `tflops`: kept (query, key) pairs, counted, times 4 head_dim (two matmuls), in training times 3.5 (the backward
    pass has five for their two), over the median, in 10^12. `gbs`: the fewest bytes that such a call must move, over
    the median, in 10^9. Neither counts what choosing the pairs takes.
    """
    found = cell.get(mode, {})
    if "seconds" not in found:
        return {"why": found.get("error") or cell.get("died") or cell.get("left_out") or "not measured"}
    times = sorted(found["seconds"])
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    median = statistics.median(times)
    done = {"median": median, "q1": low, "q3": high, "count": len(times), "peak_bytes": found["peak_bytes"]}
    if "work_flops" in found:
        done |= {"tflops": found["work_flops"] / median / 1e12, "gbs": found["least_bytes"] / median / 1e9}
    return done


def summaries(cells: list[Cell], name: str, mode: str, what: str) -> dict[int, float]:
    """Length -> one number of :func:`summary`, where there is one."""
    found = {c["length"]: summary(c, mode) for c in cells if c["attention"] == name}
    return {length: float(s[what]) for length, s in found.items() if what in s}


def medians(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> median seconds of what was measured."""
    return summaries(cells, name, mode, "median")


def peaks(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> peak bytes, where a call took any that the process did not hold already."""
    return {length: peak for length, peak in summaries(cells, name, mode, "peak_bytes").items() if peak}


def best_dense(cells: list[Cell], mode: str) -> dict[int, str]:
    """Length -> the dense row that is fastest there, in a mode of the layer, the kernel or a peer."""
    best: dict[int, tuple[float, str]] = {}
    for name in dict.fromkeys(c["attention"] for c in cells if is_dense(c["attention"])):
        for length, seconds in medians(cells, name, layer_mode(mode)).items():
            best[length] = min(best.get(length, (math.inf, "")), (seconds, name))
    return {length: name for length, (_, name) in best.items()}


def dense_medians(cells: list[Cell], mode: str) -> dict[int, float]:
    """Length -> median seconds of the fastest dense row."""
    mode = layer_mode(mode)
    return {n: medians(cells, name, mode)[n] for n, name in best_dense(cells, mode).items()}


def densities(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> counted share of the visible pairs that was computed."""
    own = [c for c in cells if c["attention"] == name]
    found = {c["length"]: c.get(mode, {}).get("density", c.get("density")) for c in own}
    return {length: density for length, density in found.items() if density is not None}


def exponent(points: dict[int, float]) -> float | None:
    """B of the least-squares fit y = a * length^b over lengths of `GROWTH_FROM` and more; None below 3 points."""
    pairs = [(math.log(n), math.log(y)) for n, y in points.items() if n >= GROWTH_FROM and y > 0]
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) >= 3 else None


def over(above: dict[int, float], below: dict[int, float]) -> dict[int, float]:
    """Quotients at the lengths that both have."""
    return {n: value / below[n] for n, value in above.items() if below.get(n)}


def ratio(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> R = time / (density x time of the fastest dense): 1 where skipping work saves as much time as work.

    Only for attentions that compute part of the visible pairs, as counted in the measured call.
    """
    density = {n: d for n, d in densities(cells, name, mode).items() if d < 1}
    return over(over(medians(cells, name, mode), dense_medians(cells, mode)), density)


def speedup(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> how many times faster than the fastest dense."""
    return over(dense_medians(cells, mode), medians(cells, name, mode))


def over_peer(cells: list[Cell], name: str, mode: str, peer: str) -> dict[int, float]:
    """Length -> how many times faster than a peer the kernel is on the same lists; `mode` is the kernel's."""
    return over(medians(cells, name, f"{mode}@{peer}"), medians(cells, name, mode))


def memory(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> peak bytes over those of the fastest dense."""
    dense = {n: peaks(cells, best, layer_mode(mode)).get(n, 0.0) for n, best in best_dense(cells, mode).items()}
    return over(peaks(cells, name, mode), dense)


def choosing(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> share of the layer's time that is not the kernel's: choosing, and learning to choose."""
    alone = over(medians(cells, name, KERNEL[mode]), medians(cells, name, mode))
    return {n: max(0.0, 1 - share) for n, share in alone.items()}


def crossover(cells: list[Cell], name: str, mode: str) -> float | None:
    """The length from which on it is faster than dense, between measured ones by straight lines in log-log.

    None where it never is, is at every length, or is only now and then.
    """
    gaps = {n: -math.log(times) for n, times in sorted(speedup(cells, name, mode).items())}
    both = list(gaps)
    changes = [(a, b) for a, b in pairwise(both) if (gaps[a] < 0) != (gaps[b] < 0)]
    if len(changes) != 1 or gaps[both[-1]] >= 0:
        return None
    left, right = changes[0]
    part = gaps[left] / (gaps[left] - gaps[right])
    return math.exp(math.log(left) + part * math.log(right / left))


def against_dense(cells: list[Cell], name: str, mode: str) -> str:
    """From which length on it is faster than the fastest dense, in words."""
    found = speedup(cells, name, mode)
    both = sorted(found)
    if not both:
        return "not measured"
    wins = [n for n in both if found[n] > 1]
    if not wins:
        return f"slower than dense at every length up to {both[-1]:,}"
    if wins != both[both.index(wins[0]) :]:
        return f"faster than dense at {', '.join(f'{n:,}' for n in wins)} only"
    return f"faster than dense from {wins[0]:,} on" if wins[0] != both[0] else "faster than dense at every length"


def missing(cells: Iterable[Cell]) -> Iterator[tuple[str, str]]:
    """What was asked for and not measured: which cell and mode, and why."""
    for cell in cells:
        for mode in asked(cell):
            if "why" in (found := summary(cell, mode)):
                yield f"{cell['attention']} at {cell['length']:,}, {mode}", str(found["why"])


def rows(cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """One flat row a cell and mode, for CSV."""
    of_mode = ("median", "q1", "q3", "count", "peak_bytes", "tflops", "gbs", "why")
    for cell in cells:
        for mode in asked(cell):
            found = summary(cell, mode)
            yield {
                "attention": cell["attention"],
                "length": cell["length"],
                "mode": mode,
                **{k: found.get(k, "") for k in of_mode},
                "density": cell.get(mode, {}).get("density", cell.get("density", "")),
                **{k: cell.get(k, "") for k in ("flops", "state_size", "parameters")},
                "backend": mode.partition("@")[2] or cell.get("backend", ""),
            }
