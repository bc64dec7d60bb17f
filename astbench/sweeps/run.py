"""Runs a sweep: what is there is kept, what stopped goes on, what failed is told; one line a cell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from astbench.console import say
from astbench.errors import ConfigError
from astbench.files.writing import write_text
from astbench.runs.folder import CONFIG, RECORD
from astbench.sweeps.estimates import Estimate, Known, estimate, known_runs
from astbench.sweeps.journal import Journal, alone
from astbench.sweeps.launcher import PATIENCE, Ended, Launcher
from astbench.sweeps.local import Local
from astbench.sweeps.spec import Cell, Sweep, expand
from astbench.sweeps.states import BEGUN, DONE, FAILED, MISSING, RESUMABLE, RUNNING, Found, look, wanted, words_to_start
from astbench.tables.records import SIDECAR

_LOOK = 0.2
_OPEN = (MISSING, BEGUN, RESUMABLE)
_SIGNALS = (130, 143, -2, -15)


@dataclass(frozen=True)
class Planned:
    """A cell, how far it is, and what it will take."""

    cell: Cell
    found: Found
    estimate: Estimate | None
    failure: str = ""

    @property
    def state(self) -> str:
        """How far it is; of a cell that failed before it could leave a record, the journal knows."""
        return FAILED if self.failure and self.found.state in _OPEN else self.found.state

    @property
    def open(self) -> bool:
        """Whether something is left to do without being asked to try again."""
        return self.state in _OPEN


def plan(sweep: Sweep, results: Path) -> tuple[list[Planned], list[str], list[Known]]:
    """The cells of a sweep with their states and estimates; what is to be said of them; the runs known.

    Args:
        sweep: What was asked for.
        results: Folder of groups of records, for the estimates.

    Raises:
        ConfigError: a cell's options are wrong, or another run lies in its folder.
        RegistryError, NameOrPluginError: an unknown attention or task.
    """
    cells, notes = expand(sweep)
    if any((sweep.folder / name).is_file() for name in (CONFIG, RECORD)):
        raise ConfigError(f"folder: {sweep.folder} is the folder of a run; name another in the sweep")
    for cell in cells:
        wanted(cell)  # all of them first: a sweep that cannot run ends before it begins
    groups = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    known = known_runs([*groups, sweep.folder])
    journal = Journal(sweep.folder, sweep.path)
    return [Planned(c, look(c), estimate(c, known), journal.failure(c.name)) for c in cells], notes, known


def show(sweep: Sweep, planned: Sequence[Planned], notes: Sequence[str], jobs: int) -> None:
    """The plan: a line a cell, and what all of it takes."""
    open_ = [one for one in planned if one.open]
    cells = f"{len(planned)} cell{'s' if len(planned) > 1 else ''}"
    say(f"{sweep.path}: {cells} in {sweep.folder}, {len(open_)} to run, {jobs} at a time")
    for note in notes:
        say(f"  {note}")
    width = max(len(one.cell.name) for one in planned)
    for one in planned:
        takes = f"{_about(one.estimate)}" if one.open else _reason(one)
        say(f"  {one.cell.name:<{width}}  {one.state:<9}  {takes}".rstrip())
    say(total([one.estimate for one in open_], jobs))


def total(estimates: Sequence[Estimate | None], jobs: int) -> str:
    """How long all of it takes, as far as that is known."""
    known = [one for one in estimates if one is not None]
    if not estimates:
        return "nothing to run"
    if not known:
        return "no run on record is like these: how long they take is not known"
    seconds = sum(one.seconds for one in known) / len(known) * len(estimates) / min(jobs, len(estimates))
    most = max(one.memory for one in known) * min(jobs, len(estimates))
    unknown = f"; {len(estimates) - len(known)} taken for as long as the others" if len(known) < len(estimates) else ""
    return f"about {duration(seconds)} for what is left, up to {most / 1e9:.1f} GB at a time{unknown}"


def _about(found: Estimate | None) -> str:
    if found is None:
        return "time unknown"
    return f"about {duration(found.seconds)}, {found.memory / 1e9:.1f} GB (after {found.after})"


def _reason(one: Planned) -> str:
    if one.state != FAILED:
        return ""
    return one.failure or str((one.found.record or {}).get("error") or "")


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


LAUNCHERS = ("local", "slurm", "ray")
"""Who runs the cells."""


def run(sweep: Sweep, *, jobs: int, retry: bool, plugins: Sequence[str], results: Path, launcher: str = "local") -> int:
    """Run what is open; 0 when every cell is done, 1 otherwise.

    Args:
        sweep: What to run.
        jobs: Processes at a time.
        retry: Try again what failed; its folder moves to `failed/`.
        plugins: Code that every cell loads.
        results: Folder of groups of records, for the estimates.
        launcher: One of :data:`LAUNCHERS`; the sweep's file holds its options.

    Raises:
        ConfigError: as :func:`plan`, another sweep runs there, or the launcher cannot be had.
        Stopped: asked to stop; cells that ran have saved what can be resumed.
    """
    with alone(sweep.folder):
        planned, notes, known = plan(sweep, results)
        if any([_wait_for(one) for one in planned if one.found.state == RUNNING]):
            planned, notes, known = plan(sweep, results)
        show(sweep, planned, notes, jobs)
        journal = Journal(sweep.folder, sweep.path)
        _write_sidecar(sweep)
        if retry:
            _put_aside(sweep, [one.cell for one in planned if one.found.state == FAILED])
        cells = [one.cell for one in planned if one.open or (retry and one.state == FAILED)]
        left = {cell.name: cell for cell in cells}

        def words(cell: Cell) -> list[str]:
            typed = words_to_start(cell, plugins)
            journal.started(cell.name, typed)
            return typed

        started = _launcher(launcher, sweep, jobs, plugins)
        try:
            for ended in started.run(cells, words):
                del left[ended.cell.name]
                line = _ended(ended, journal, known)
                rest = [estimate(cell, known) for cell in left.values()]
                say(f"[{len(cells) - len(left)}/{len(cells)}] {line}" + (f"; {total(rest, jobs)}" if rest else ""))
        finally:
            for ended in started.stopped:
                say(_ended(ended, journal, known))
        return _conclude(planned, journal)


def _launcher(name: str, sweep: Sweep, jobs: int, plugins: Sequence[str]) -> Launcher:
    logs, options = sweep.folder / "logs", sweep.launchers.get(name, {})
    if name == "slurm":
        from astbench.sweeps.slurm import Slurm

        return Slurm(jobs, logs, options, plugins)
    if name == "ray":
        from astbench.sweeps.ray_cluster import RayCluster

        return RayCluster(jobs, logs, options, plugins)
    return Local(jobs, visible_gpus() if jobs > 1 else [], logs)


def _write_sidecar(sweep: Sweep) -> None:
    """`astbench table NAME --results=FOLDER` shows the sweep, with nothing written by hand."""
    file = sweep.folder / SIDECAR
    if sweep.command != "bench" and not file.exists():
        write_text(file, f"kind: sweep\ntitle: {json.dumps(sweep.folder.name)}\n")


def _wait_for(one: Planned) -> bool:
    """Give a cell that a sweep before this one left behind, and that is saving, time to end; whether it did."""
    say(f"{one.cell.folder} is being written; waiting for it")
    end = time.monotonic() + PATIENCE
    while (running := look(one.cell).state == RUNNING) and time.monotonic() < end:
        time.sleep(_LOOK)
    return not running


def _put_aside(sweep: Sweep, cells: Sequence[Cell]) -> None:
    for cell in cells:
        number = 1
        while (aside := sweep.folder / "failed" / f"{cell.name}-{number}").exists():
            number += 1
        aside.parent.mkdir(exist_ok=True)
        os.rename(cell.folder, aside)


def _ended(ended: Ended, journal: Journal, known: list[Known]) -> str:
    """Enter how a cell ended, and say so."""
    cell = ended.cell
    try:
        found = look(cell)
    except ConfigError as error:  # the others go on
        found, ended = Found(FAILED), replace(ended, said=str(error))
    if ended.code in (0, 1) and found.state == DONE:  # a bench ends with 1 when a gate is red, and has its record
        journal.ended(cell.name, "done", ended.code, ended.seconds, "")
        known += [
            run for run in known_runs([cell.folder.parent]) if run.name == f"{cell.folder.parent.name}/{cell.name}"
        ]
        return f"{cell.name} done in {duration(ended.seconds)}{_scores(found.record or {})}"
    if ended.code in _SIGNALS:
        journal.ended(cell.name, "stopped", ended.code, ended.seconds, ended.said)
        return f"{cell.name} was stopped: {ended.said}"
    why = f"killed by signal {-ended.code}" if ended.code < 0 else ended.said
    why += ", which the system sends when memory is used up" if ended.code == -9 else ""
    why = why or "it left no finished run"
    journal.ended(cell.name, "failed", ended.code, ended.seconds, why)
    return f"{cell.name} FAILED with {ended.code} after {duration(ended.seconds)}: {why}"


def _scores(record: dict[str, Any]) -> str:
    metrics = {key: value for key, value in (record.get("metrics") or {}).items() if isinstance(value, int | float)}
    return "".join(f", {key} {value:.4g}" for key, value in list(metrics.items())[:3])


def _conclude(planned: Sequence[Planned], journal: Journal) -> int:
    """Count the cells by what became of them."""
    found = {one.cell.name: look(one.cell).state for one in planned}
    states = {name: FAILED if state in _OPEN and journal.failure(name) else state for name, state in found.items()}
    done = sum(state == DONE for state in states.values())
    say(f"{done} of {len(states)} cells done")
    for name, state in states.items():
        if state != DONE:
            why = journal.entry(name).get("error", "")
            say(f"  {name}: {'runs elsewhere' if state == RUNNING else state}{f': {why}' if why else ''}")
    if any(state == FAILED for state in states.values()):
        say("what failed is not tried again by itself: astbench run ... --retry")
    return 0 if done == len(states) else 1


def visible_gpus() -> list[str]:
    """Devices that cells can be given, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
