"""What the GPU kernels are to reach, and how each of it follows from the record of a recipe.

A floor is where the kernel is worth having, a goal is where it competes with the best that is published. Both were
set before anything was measured.
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


def _milliseconds(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    return {length: 1000 * seconds for length, seconds in analysis.medians(cells, name, mode).items()}


def _shared() -> Iterable[Goal]:
    """Lists that many rows share: R and FlexAttention."""
    bounds = {  # (rows a list, mode): R, (floor, goal)
        (128, "kernel"): (1.45, 1.2),
        (64, "kernel"): (1.9, 1.35),
        (128, "kernel_training"): (2.0, 1.45),
        (64, "kernel_training"): (2.3, 1.6),
    }
    for (rows, mode), (floor, goal) in bounds.items():
        passes = "forward" if mode == "kernel" else "forward and backward"
        for density in (0.125, 0.0625):
            name, recipe = f"ast {density:g}, random lists", f"gpu-shared-{rows}"
            where = f"{rows} rows a list, blocks of 64, density 1/{1 / density:.0f}, {passes}"
            ratio = partial(analysis.ratio, name=name, mode=mode)
            yield Goal(where, recipe, 32768, ratio, (name, mode), floor, goal, "R")
            peer = (name, f"{mode}@flex")
            over = f"{where}, over FlexAttention"
            yield Goal(over, recipe, 32768, _over_flex(name, mode), peer, 1.0, 1.4, "times faster", rising=True)


def _rest() -> Iterable[Goal]:
    drawn, uneven = "ast 0.125, random lists", "ast 0.125, uneven lists"
    for mode, passes, floor, goal in (
        ("kernel", "forward", 2.5, 1.6),
        ("kernel_training", "forward and backward", 3.0, 2.0),
    ):
        ratio = partial(analysis.ratio, name=drawn, mode=mode)
        what = f"causal, a list a token, blocks of 64, density 1/8, {passes}"
        yield Goal(what, "gpu-token", 32768, ratio, (drawn, mode), floor, goal, "R")
    for mode, passes in (("kernel", "forward"), ("kernel_training", "forward and backward")):
        what = f"uneven lists over even ones, for a pair, {passes}"
        yield Goal(
            what, "gpu-uneven", 32768, _uneven(drawn, uneven, mode), (uneven, mode), 1.25, 1.08, "times the time"
        )
    for batch, mode, floor, goal in (
        (16, "kernel_decode", 5.0, 8.5),
        (1, "kernel_decode", 2.0, 5.0),
        (16, "decode", 5.0, 8.5),
        (1, "decode", 2.0, 5.0),
    ):
        faster = partial(analysis.speedup, name="ast 0.1", mode=mode)
        what = f"decode, batch {batch}, density 1/10, {'layer' if mode == 'decode' else 'kernel'}, over dense"
        row = ("ast 0.1", mode)
        yield Goal(what, f"gpu-decode-{batch}", 131072, faster, row, floor, goal, "times faster", rising=True)
    share = partial(analysis.choosing, name="ast 0.125", mode="forward")
    row = ("ast 0.125", "forward")
    yield Goal("share of choosing in the layer, forward", "gpu-layer", 8192, share, row, 0.2, 0.1, "of the time")
    yield Goal("share of choosing in the layer, forward", "gpu-layer", 32768, share, row, 0.08, 0.03, "of the time")
    row = ("ast 0.125", "training")
    for mode, what in (("training", "layer"), ("kernel_training", "kernel")):
        memory = partial(analysis.memory, name="ast 0.125", mode=mode)
        words = f"peak memory of the {what}, forward and backward"
        yield Goal(words, "gpu-layer", 32768, memory, ("ast 0.125", mode), 1.35, 1.1, "times dense")
    crossing = _crossing("ast 0.125", "training")
    yield Goal(
        "the layer in training is faster than dense from", "gpu-layer", 32768, crossing, row, 12288, 4096, "tokens"
    )
    for name, mode, what in (("ast, random lists", "kernel", "kernel"), ("ast", "forward", "layer")):
        time = partial(_milliseconds, name=name, mode=mode)
        words = f"a million tokens, 8,192 keys a query, 8 heads, forward, {what}"
        # The floor is that it runs.
        yield Goal(words, "gpu-million", 1048576, time, (name, mode), 60_000.0, 90.0, "ms")


GOALS = (*_shared(), *_rest())
