"""The cells of a recipe, and how far each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from astbench.console import say
from astbench.deploy.cells import Calibration, Cell, cell_of, config_of, finished
from astbench.deploy.recipe import Load, Recipe
from astbench.sweeps.journal import Journal

DONE, FAILED, OPEN, BEYOND = "done", "failed", "to run", "past the knee"
"""States of a cell; at a rate above one that was not held nothing is measured."""


@dataclass(frozen=True)
class Planned:
    """A cell and how far it is; `why` it failed."""

    cell: Cell
    state: str
    why: str = ""


def plan(recipe: Recipe) -> list[Planned]:
    """The cells in the order in which they run, with their states.

    Raises:
        ConfigError: another cell's record lies in a folder.
    """
    return [Planned(cell, *_state(recipe, cell)) for cell in cells(recipe)]


def cells(recipe: Recipe) -> Iterator[Cell]:
    """Every cell: server by server, length by length, rate by rate."""
    for served in recipe.servers:
        for load in recipe.loads:
            yield cell_of(recipe, served, load, None)
            yield from (cell_of(recipe, served, load, rate) for rate in recipe.rates)


def show(recipe: Recipe, planned: Sequence[Planned]) -> None:
    """A line a cell."""
    left = sum(one.state == OPEN for one in planned)
    say(f"{recipe.path}: {len(planned)} cells in {recipe.folder}, {left} to run")
    width = max(len(one.cell.name) for one in planned)
    for one in planned:
        say(f"  {one.cell.name:<{width}}  {one.state:<13}  {one.why}".rstrip())


def _state(recipe: Recipe, cell: Cell) -> tuple[str, str]:
    """How far a cell is, and why it failed."""
    calibration = None
    if cell.rate is not None and recipe.calibrated:
        calibration = calibration_of(recipe, cell.load)
    if cell.rate is None or calibration is not None or not recipe.calibrated:
        if finished(cell, config_of(recipe, cell, calibration)) is not None:
            return DONE, ""
        lower = [cell_of(recipe, cell.served, cell.load, rate) for rate in recipe.rates if rate < (cell.rate or 0)]
        records = [finished(one, config_of(recipe, one, calibration)) for one in lower]
        if any(record is not None and not held(record) for record in records):
            return BEYOND, ""
    if recipe.folder.is_dir() and (why := Journal(recipe.folder, recipe.path).failure(cell.name)):
        return FAILED, why
    return OPEN, ""


def calibration_of(recipe: Recipe, load: Load) -> Calibration | None:
    """What the reference takes at a length, where it was measured."""
    if not recipe.calibrated:
        return None
    cell = cell_of(recipe, recipe.reference, load, None)
    record = finished(cell, config_of(recipe, cell, None))
    return None if record is None else Calibration.of(record)


def held(record: dict[str, Any]) -> bool:
    """Whether the share of good answers stayed."""
    return bool(record["load"]["good_share"] >= record["config"]["good_share"])
