"""What the GPU kernels are to reach, and how each of it follows from the record of a recipe.

A floor is where the kernel is worth having, a goal is where it competes with the best that is published. Both were
set before anything was measured; change them with the reason, in a commit of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from astbench.bench import analysis
from astbench.bench.analysis import Cell

Values = Callable[[list[Cell]], Mapping[int, float]]


@dataclass(frozen=True)
class Goal:
    """One number to reach.

    Attributes:
        what: In words.
        recipe: Of recipes/bench, without the ending.
        length: Tokens at which it counts.
        values: Cells of the record -> length -> number.
        row: Attention and mode that must have been measured; their reason stands where there is no number.
        floor: Least that is wanted.
        goal: What is wanted.
        unit: Of the number.
        rising: More is better.
    """

    what: str
    recipe: str
    length: int
    values: Values
    row: tuple[str, str]
    floor: float
    goal: float
    unit: str
    rising: bool = False

    def verdict(self, value: float) -> str:
        """goal, floor or below."""
        sign = 1 if self.rising else -1
        return "goal" if sign * value >= sign * self.goal else "floor" if sign * value >= sign * self.floor else "below"

    def result(self, cells: list[Cell] | None, why: str = "") -> dict[str, Any]:
        """The goal with what was measured, or why nothing was; `cells` None when the recipe left none."""
        value = None if cells is None else self.values(cells).get(self.length)
        if value is None and cells is not None:
            why = self._reason(cells)
        measured = {"value": value, "reached": "not measured" if value is None else self.verdict(value), "why": why}
        shown = {name: getattr(self, name) for name in ("what", "recipe", "length", "unit", "floor", "goal", "rising")}
        return shown | measured

    def _reason(self, cells: list[Cell]) -> str:
        name, mode = self.row
        own = [cell for cell in cells if (cell["attention"], cell["length"]) == (name, self.length)]
        if not own:
            return f"the record has no {name} at {self.length:,} tokens"
        for needed in dict.fromkeys((mode.partition("@")[0], mode)):
            if "why" in (found := analysis.summary(own[0], needed)):
                return str(found["why"])
        verdict = analysis.against_dense(cells, name, mode)
        return "no dense row was measured" if verdict == "not measured" else verdict


def _over_flex(name: str, mode: str) -> Values:
    return lambda cells: analysis.over_peer(cells, name, mode, "flex")


def _uneven(even: str, uneven: str, mode: str) -> Values:
    """Time of a kept pair in uneven lists over that in even ones."""

    def values(cells: list[Cell]) -> dict[int, float]:
        rates = (analysis.summaries(cells, name, mode, "tflops") for name in (even, uneven))
        return analysis.over(*rates)

    return values


def _crossing(name: str, mode: str) -> Values:
    """The length from which on it is faster, at the longest one; the shortest where it is faster at all."""

    def values(cells: list[Cell]) -> dict[int, float]:
        speedup = analysis.speedup(cells, name, mode)
        if not speedup:
            return {}
        always = min(speedup.values()) > 1
        found = float(min(speedup)) if always else analysis.crossover(cells, name, mode)
        return {} if found is None else {max(speedup): found}

    return values


def _shared() -> Iterable[Goal]:
    """Lists that many rows share: R and FlexAttention."""
    bounds = {  # (rows a list, mode): R at density 1/8 and at 1/16, each (floor, goal)
        (128, "kernel"): ((1.6, 1.3), (1.8, 1.4)),
        (64, "kernel"): ((2.0, 1.5), (2.2, 1.6)),
        (128, "kernel_training"): ((1.8, 1.5), (2.0, 1.6)),
        (64, "kernel_training"): ((2.2, 1.8), (2.5, 1.9)),
    }
    for (rows, mode), by_density in bounds.items():
        passes = "forward" if mode == "kernel" else "forward and backward"
        for density, (floor, goal) in zip((0.125, 0.0625), by_density, strict=True):
            name, recipe = f"ast {density:g}, random lists", f"gpu-shared-{rows}"
            where = f"{rows} rows a list, blocks of 64, density 1/{1 / density:.0f}, {passes}"
            ratio = partial(analysis.ratio, name=name, mode=mode)
            yield Goal(where, recipe, 32768, ratio, (name, mode), floor, goal, "R")
            peer = (name, f"{mode}@flex")
            over = f"{where}, over FlexAttention"
            yield Goal(over, recipe, 32768, _over_flex(name, mode), peer, 1.0, 1.2, "times faster", rising=True)


def _rest() -> Iterable[Goal]:
    drawn, uneven = "ast 0.125, random lists", "ast 0.125, uneven lists"
    for mode, passes in (("kernel", "forward"), ("kernel_training", "forward and backward")):
        ratio = partial(analysis.ratio, name=drawn, mode=mode)
        what = f"causal, a list a token, blocks of 64, density 1/8, {passes}"
        yield Goal(what, "gpu-token", 32768, ratio, (drawn, mode), 5.0, 3.0, "R")
    for mode, passes in (("kernel", "forward"), ("kernel_training", "forward and backward")):
        what = f"uneven lists over even ones, for a pair, {passes}"
        yield Goal(what, "gpu-uneven", 32768, _uneven(drawn, uneven, mode), (uneven, mode), 1.25, 1.1, "times the time")
    for batch, mode, floor, goal in (
        (16, "kernel_decode", 5.0, 8.0),
        (1, "kernel_decode", 2.0, 5.0),
        (16, "decode", 1.0, 4.0),
        (1, "decode", 1.0, 2.0),
    ):
        faster = partial(analysis.speedup, name="ast 0.1", mode=mode)
        what = f"decode, batch {batch}, density 1/10, {'layer' if mode == 'decode' else 'kernel'}, over dense"
        row = ("ast 0.1", mode)
        yield Goal(what, f"gpu-decode-{batch}", 131072, faster, row, floor, goal, "times faster", rising=True)
    share = partial(analysis.choosing, name="ast 0.125", mode="forward")
    row = ("ast 0.125", "forward")
    yield Goal("share of choosing in the layer, forward", "gpu-layer", 8192, share, row, 0.3, 0.2, "of the time")
    yield Goal("share of choosing in the layer, forward", "gpu-layer", 32768, share, row, 0.25, 0.15, "of the time")
    row = ("ast 0.125", "training")
    memory = partial(analysis.memory, name="ast 0.125", mode="training")
    yield Goal("peak memory of the layer in training", "gpu-layer", 32768, memory, row, 3.0, 1.5, "times dense")
    crossing = _crossing("ast 0.125", "training")
    yield Goal(
        "the layer in training is faster than dense from", "gpu-layer", 32768, crossing, row, 8192, 4096, "tokens"
    )
    for name, mode, what, floor, goal in (
        ("ast, random lists", "kernel", "kernel", 250, 400),
        ("ast", "forward", "layer", 100, 250),
    ):
        rate = partial(analysis.summaries, name=name, mode=mode, what="tflops")
        words = f"a million tokens, 8,192 keys a query, 8 heads, forward, {what}"
        yield Goal(words, "gpu-million", 1048576, rate, (name, mode), floor, goal, "TFLOP/s", rising=True)


GOALS = (*_shared(), *_rest())
