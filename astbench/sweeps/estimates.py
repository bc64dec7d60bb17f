"""What a cell will take, from the run on record that is nearest to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench.runs.folder import RECORD
from astbench.runs.record import read_record
from astbench.sweeps.spec import Cell
from astbench.sweeps.states import wanted
from astbench.tables.defaults import Options, flatten

START = 10.0
"""Seconds that a command needs before its run begins, which no record counts."""

_IGNORED = ("seed_everything", "run_dir")
_TOKENS = ("data.length", "data.context", "data.max_length", "data.batch_size")
"""Options that the tokens of a step grow with."""


@dataclass(frozen=True)
class Known:
    """A finished run: what it was, and what it took.

    Attributes:
        name: Its folder, as it is told.
        command: fit, validate, test or bench.
        options: As in its record, flat.
        seconds: Wall time of all its processes, training apart in `training`.
        training: Seconds of it that went by the step.
        steps: Training steps; 0 where it trained none.
        memory: Largest resident bytes, of the device where there was one.
    """

    name: str
    command: str
    options: Options
    seconds: float
    training: float
    steps: int
    memory: int


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes, and after which run."""

    seconds: float
    memory: int
    after: str


def known_runs(folders: Iterable[Path]) -> list[Known]:
    """Every finished run in these folders; what cannot be read is left out."""
    found = []
    for folder in dict.fromkeys(folders):
        for file in sorted(folder.glob(f"*/{RECORD}")):
            record = read_record(file)
            if record is not None and record.get("state") == "done" and isinstance(record.get("config"), dict):
                found.append(_known(file.parent, record))
    return found


def _known(folder: Path, record: dict[str, Any]) -> Known:
    train = record.get("train") or {}
    bench = record["command"] == "bench"
    earlier = sum(one.get("wall_seconds", 0.0) for one in record.get("earlier", []))
    memory = record.get("peak_memory") or {}
    return Known(
        name=f"{folder.parent.name}/{folder.name}",
        command=str(record.get("command")),
        options=dict(record["config"]) if bench else flatten(record["config"]),
        seconds=float(record.get("wall_seconds") or 0.0) + earlier,
        training=float(train.get("wall_seconds") or 0.0),
        steps=int(train.get("steps") or 0),
        memory=int(memory.get("gpu_bytes") or memory.get("cpu_bytes") or 0),
    )


def estimate(cell: Cell, known: Sequence[Known]) -> Estimate | None:
    """From the nearest run of the same command and task, scaled by steps and by the tokens of a step. None without one.

    The nearest run is the one with the fewest other options; one of the same model comes first, then one of the same
    attention: models differ more than attentions do.
    """
    asked = wanted(cell)
    same = [run for run in known if run.command == cell.command and run.seconds > 0]
    if cell.command != "bench":
        same = [run for run in same if run.options.get("task.name") == asked["task.name"]]
    if not same:
        return None
    key = "attention" if cell.command == "bench" else "attention.name"

    def distance(run: Known) -> tuple[bool, bool, int]:
        others = sum(run.options.get(k, v) != v for k, v in asked.items() if k not in _IGNORED)
        model, attention = (run.options.get(k) != asked.get(k) for k in ("backbone.name", key))
        return model, attention, others

    nearest = min(same, key=distance)
    steps = asked.get("trainer.max_steps")
    seconds = nearest.seconds
    if nearest.steps and isinstance(steps, int) and steps > 0 and nearest.training <= seconds:
        seconds = seconds - nearest.training + nearest.training * steps / nearest.steps
    more = math.prod(_ratio(asked.get(key), nearest.options.get(key)) for key in _TOKENS)
    return Estimate(START + seconds * more, int(nearest.memory * max(1.0, more)), nearest.name)


def _ratio(asked: Any, held: Any) -> float:
    known = all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in (asked, held))
    return asked / held if known else 1.0
