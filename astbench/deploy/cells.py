"""One server, one length, one rate: a cell, its options, and what its folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from astbench.deploy.recipe import Load, Recipe, Served
from astbench.errors import ConfigError, DataError
from astbench.files.paths import other_kind
from astbench.files.writing import TEMPORARY, sha256
from astbench.loadtest.objective import Objective
from astbench.runs.folder import RECORD
from astbench.runs.record import config_hash, read_record
from astbench.tables.records import ITEMS

CAPACITY = "capacity"
"""`rate` of the first cell of a server and length: a few requests one by one, then as many at once as run together."""

COMMAND = "deploy-test"


@dataclass(frozen=True)
class Cell:
    """One record.

    Attributes:
        served: The server.
        load: The requests.
        rate: As the recipe says it; None for the capacity.
        name: Its folder below the recipe's.
        folder: Where it is.
    """

    served: Served
    load: Load
    rate: float | None
    name: str
    folder: Path


@dataclass(frozen=True)
class Calibration:
    """What the reference takes at one length.

    Attributes:
        alone: Median seconds of requests that come one by one: `latency`, and `ttft` and `tpot` of texts.
        capacity: Requests a second when as many come at once as run together.
    """

    alone: Mapping[str, float]
    capacity: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Calibration:
        """From the record of a cell of :data:`CAPACITY`."""
        return cls(dict(record["alone"]), float(record["load"]["throughput_per_second"]))


def cell_of(recipe: Recipe, served: Served, load: Load, rate: float | None) -> Cell:
    """A cell by what it is."""
    label = CAPACITY if rate is None else f"{rate:g}{'x' if recipe.of_capacity else 'ps'}"
    name = f"{served.name}-{load.length}-{label}"
    return Cell(served, load, rate, name, recipe.folder / name)


def rate_of(recipe: Recipe, cell: Cell, calibration: Calibration | None) -> tuple[float, Objective]:
    """Requests a second, and what a good answer is."""
    assert cell.rate is not None
    if recipe.calibrated:
        assert calibration is not None
    alone = calibration.alone if calibration else {}
    rate = cell.rate * calibration.capacity if recipe.of_capacity and calibration else cell.rate
    return float(f"{rate:.4g}"), cell.load.objective(alone)


def config_of(recipe: Recipe, cell: Cell, calibration: Calibration | None) -> dict[str, Any]:
    """Everything that decides what a cell measures.

    Raises:
        DataError: the text is not there.
    """
    rate: dict[str, Any] = {"rate": CAPACITY}
    if cell.rate is not None:
        per_second, objective = rate_of(recipe, cell, calibration)
        rate = {
            "rate": per_second,
            "requests": cell.load.requests,
            "slo": objective.said(),
            "good_share": recipe.good_share,
        }
        rate |= {"of_capacity": cell.rate} if recipe.of_capacity else {}
    return {
        "server": cell.served.name,
        "reference": recipe.reference.name,
        "model": cell.served.model,
        "attention": dict(cell.served.attention),
        "serve": dict(recipe.serve),
        "path": recipe.route,
        "text": {"file": str(recipe.text), "sha256": _digest(recipe.text.expanduser().resolve())},
        **({"question": recipe.question} if recipe.route == "/answer" else {}),
        "length": cell.load.length,
        "output": cell.load.output,
        **rate,
        "client_timeout": recipe.timeout,
        "seed": recipe.seed,
    }


def finished(cell: Cell, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a cell that is done; None where it has to be measured.

    Raises:
        ConfigError: another cell's lies there.
    """
    record = read_record(cell.folder / RECORD)
    if record is None or record.get("state") != "done":
        if record is None and cell.folder.is_dir() and any(_foreign(file) for file in cell.folder.iterdir()):
            raise ConfigError(f"{cell.folder} holds files and no record; give the recipe another folder")
        return None
    if record.get("config_hash") == config_hash(dict(config)):
        return record
    held = record.get("config") or {}
    key = next((key for key in {**held, **config} if _plain(held.get(key)) != _plain(config.get(key))), "config")
    raise ConfigError(
        f"{cell.folder} holds another cell: {key} is {held.get(key)} there and {config.get(key)} here; "
        "move it away, or give the recipe another folder"
    )


@cache
def _digest(text: Path) -> str:
    """Of the file that prompts are cut from, which may be large."""
    if not text.is_file():
        raise DataError(f"text: {text} does not exist{other_kind(text)}; name a file of text")
    return sha256(text)


def _foreign(file: Path) -> bool:
    """Whether a file is none that a kill leaves behind."""
    return file.name != ITEMS and not file.name.endswith(TEMPORARY)


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
