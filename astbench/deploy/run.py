"""Runs a recipe: what is measured stays, what failed is told, each server is started once and stopped."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from astbench.console import say
from astbench.deploy.cells import COMMAND, Calibration, Cell, cell_of, config_of, finished
from astbench.deploy.measure import Found, Measure
from astbench.deploy.plan import BEYOND, DONE, FAILED, OPEN, calibration_of, held, plan, show
from astbench.deploy.recipe import Load, Recipe, Served
from astbench.deploy.server import Server, ServerFailed
from astbench.deploy.workload import Workload
from astbench.errors import Stopped
from astbench.files.writing import write_json, write_text
from astbench.runs.folder import RECORD
from astbench.runs.record import new_record
from astbench.serving.options import KEY
from astbench.sweeps.journal import Journal, alone
from astbench.tables.records import ITEMS, SIDECAR


def run(recipe: Recipe, words: Sequence[str], *, retry: bool = False, plugins: Sequence[str] = ()) -> int:
    """Run what is open; 0 when every cell is done or past the knee, 1 otherwise.

    Args:
        recipe: What to run.
        words: What was typed after the command, for the records.
        retry: Try again what failed.
        plugins: Code that every server loads.

    Raises:
        ConfigError: another cell's record lies in a folder, or this recipe runs there already.
        DataError: the text is shorter than a request.
        Stopped: asked to stop; the server is, too, and finished cells stay.
    """
    with alone(recipe.folder):
        show(recipe, planned := plan(recipe))
        workload = Workload(recipe)
        if any(one.state == OPEN or (retry and one.state == FAILED) for one in planned):
            workload.check()
        journal = Journal(recipe.folder, recipe.path)
        if not (recipe.folder / SIDECAR).exists():
            write_text(recipe.folder / SIDECAR, f"kind: deploy\ntitle: {json.dumps(recipe.title)}\n")
        measure = Measure(recipe, workload, os.environ.get(KEY, ""))
        for served in recipe.servers:
            with _OfServer(recipe, served, measure, journal, words, plugins, retry) as one:
                for load in recipe.loads:
                    one.length(load)
        return _conclude(recipe)


class _OfServer:
    """The cells of one server, which is started when the first of them has to be measured.

    Args:
        recipe, measure, journal, words, plugins, retry: Of the run.
        served: The server.
    """

    def __init__(
        self,
        recipe: Recipe,
        served: Served,
        measure: Measure,
        journal: Journal,
        words: Sequence[str],
        plugins: Sequence[str],
        retry: bool,
    ) -> None:
        self._recipe, self._served, self._measure, self._journal = recipe, served, measure, journal
        self._words, self._plugins, self._retry = words, plugins, retry
        self._running = ExitStack()
        self._server: Server | None = None
        self._never = ""  # why it does not start
        self._warm = False

    def __enter__(self) -> _OfServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def length(self, load: Load) -> None:
        """All cells of a length, up to the first rate that is not held."""
        self._warm = False
        recipe, served = self._recipe, self._served
        self._cell(cell_of(recipe, served, load, None), None)
        calibration = calibration_of(recipe, load)
        for rate in recipe.rates:
            cell = cell_of(recipe, served, load, rate)
            if recipe.calibrated and calibration is None:
                name = cell_of(recipe, recipe.reference, load, None).name
                self._failed(cell, time.monotonic(), f"{name} failed, which says at what rate requests come")
                continue
            record = self._cell(cell, calibration)
            if record is not None and not held(record):
                return

    def _cell(self, cell: Cell, calibration: Calibration | None) -> dict[str, Any] | None:
        """Measure a cell unless it is done, or failed before; its record, None if there is none."""
        config = config_of(self._recipe, cell, calibration)
        if (record := finished(cell, config)) is not None:
            return record
        if self._journal.failure(cell.name) and not self._retry:
            return None
        began = time.monotonic()
        self._journal.started(cell.name, [COMMAND, *self._words])
        record = new_record(COMMAND, config, self._recipe.seed, self._words) | {"recipe": str(self._recipe.path)}
        record["hardware"]["threads"] = self._recipe.serve.get("threads", record["hardware"]["threads"])
        try:
            part, items = self._measured(cell, calibration)
        except ServerFailed as error:
            self._failed(cell, began, str(error), record)
            return None
        except Stopped as error:
            self._journal.ended(cell.name, "stopped", error.exit_code, time.monotonic() - began, "")
            raise
        record |= {**part, "state": DONE, "wall_seconds": round(time.monotonic() - began, 3)}
        cell.folder.mkdir(exist_ok=True)
        write_json(cell.folder / ITEMS, items)
        write_json(cell.folder / RECORD, record)
        self._journal.ended(cell.name, DONE, 0, time.monotonic() - began, "")
        say(f"{cell.name} done in {time.monotonic() - began:.0f} s: {_told(record)}")
        return record

    def _measured(self, cell: Cell, calibration: Calibration | None) -> Found:
        server = self._ready()
        try:
            if not self._warm:
                self._measure.warm(cell, server)
                self._warm = True
            if cell.rate is None:
                return self._measure.capacity(cell, server)
            return self._measure.rate(cell, server, calibration)
        except ServerFailed:
            if server.died():
                self._running.close()
                self._server, self._warm = None, False  # the next cell gets a new one
            raise

    def _ready(self) -> Server:
        if self._never:
            raise ServerFailed(self._never)
        if self._server is None:
            words = self._served.words(self._recipe.serve, self._plugins)
            say(f"astbench {shlex.join(words)}")
            server = Server(words, self._recipe.folder / "logs" / f"{self._served.name}.log", os.environ.get(KEY, ""))
            try:
                self._server = self._running.enter_context(server)
            except ServerFailed as error:
                self._never = str(error)
                raise
        return self._server

    def _failed(self, cell: Cell, began: float, why: str, record: dict[str, Any] | None = None) -> None:
        self._journal.ended(cell.name, FAILED, 1, time.monotonic() - began, why)
        if record is not None:
            cell.folder.mkdir(exist_ok=True)
            (cell.folder / ITEMS).unlink(missing_ok=True)
            write_json(cell.folder / RECORD, {**record, "state": FAILED, "error": why})
        say(f"{cell.name} FAILED after {time.monotonic() - began:.0f} s: {why}")


def _told(record: dict[str, Any]) -> str:
    load = record["load"]
    if "alone" in record:
        alone = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in record["alone"].items())
        return f"{load['throughput_per_second']:.3g} a second at most; alone {alone}"
    p50 = load["latency_seconds"]["p50"]["value"]
    said = "never" if p50 is None else f"{p50:.3g} s"
    return (
        f"{record['config']['rate']:g} a second asked for, {load['goodput_per_second']:.3g} answered well "
        f"({100 * load['good_share']:.0f}%), latency {said} in the middle"
    )


def _conclude(recipe: Recipe) -> int:
    """Draw the curves, count the cells by what became of them."""
    from astbench.deploy.curves import draw
    from astbench.tables.records import read_group

    planned = plan(recipe)
    done = sum(one.state in (DONE, BEYOND) for one in planned)
    say(f"{done} of {len(planned)} cells done or past the knee")
    for one in planned:
        if one.state == FAILED:
            say(f"  {one.cell.name}: failed: {one.why}")
    if any(one.state == FAILED for one in planned):
        say("what failed is not tried again by itself: astbench deploy-test ... --retry")
    if any(one.state == DONE and one.cell.rate is not None for one in planned):
        for name in draw(read_group(recipe.folder), recipe.folder):
            say(f"{recipe.folder / name}")
        say(f"astbench table {recipe.folder.name} --results={recipe.folder.parent}")
    return 0 if done == len(planned) else 1
