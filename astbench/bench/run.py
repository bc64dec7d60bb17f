"""A whole bench: conformance, cells, and the folder with record, CSV, text and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from astbench.bench import layers
from astbench.bench.analysis import Cell, missing, rows
from astbench.bench.clocks import METHOD
from astbench.bench.config import BenchConfig
from astbench.bench.plot import draw_curves
from astbench.bench.processes import Worker
from astbench.bench.report import report
from astbench.console import say
from astbench.errors import ConfigError, MissingPackageError
from astbench.files.writing import write_json, write_text
from astbench.runs.folder import RECORD, RunFolder
from astbench.runs.record import new_record
from astbench_registry.plugins import code_facts, import_plugin


def check(config: BenchConfig) -> None:
    """Whether this machine can do it at all.

    Raises:
        MissingPackageError: no CUDA device, and --device=cuda.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise MissingPackageError(
            "--device=cuda needs a CUDA device, and torch finds none; run where there is one, or use --device=cpu"
        )


def run_bench(config: BenchConfig, typed: Sequence[str], worker: Worker) -> tuple[RunFolder, dict[str, Any]]:
    """Measure, print, and leave record, CSV and plots in the run folder; returns the folder and the record.

    Args:
        config: What to measure.
        typed: What was typed after the command, for the record.
        worker: Where cells are measured.

    Raises:
        AstbenchError: it cannot run here, or dense attention itself is wrong.
    """
    check(config)
    entries = layers.chosen(config, say)
    folder = RunFolder(config.run_dir) if config.run_dir else RunFolder.claim("bench", "layers")
    folder.open_for_writing(resume=False)
    record = new_record("bench", asdict(config), config.seed, typed)
    record["hardware"]["threads"] = config.threads
    record["plugins"] = [code_facts(plugin, import_plugin(plugin).__name__) for plugin in config.plugins]
    record["method"] = METHOD[config.device]
    write_json(folder / RECORD, record)
    try:
        record = _measure(config, entries, folder, record, worker)
    except BaseException as error:
        ended = {"state": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        write_json(folder / RECORD, {**record, **ended})
        raise
    finally:
        folder.close()
    return folder, record


def _measure(
    config: BenchConfig, entries: list[layers.Entry], folder: RunFolder, record: dict[str, Any], worker: Worker
) -> dict[str, Any]:
    names = list(dict.fromkeys(entry.name for entry in entries))
    heads = f"{config.heads} heads of {config.head_dim}"
    say(f"{len(names)} attentions, {config.pattern}, {heads}, {config.dtype}, {config.device}")
    say("conformance first: what fails is not timed")
    gates = {name: layers.red(name, config) for name in names}
    red = {name: why for name, why in gates.items() if why}
    for name, why in red.items():
        say(f"  {name}: {why}")
    if "dense" in red:
        raise ConfigError("dense, which all others are compared with, fails its conformance suite")
    green = [entry for entry in entries if entry.name not in red]
    cells = layers.measure(config, green, say, worker)
    text = report(cells, config)
    say(text)
    red |= {place: why for place, why in missing(cells) if why.startswith("gate: ")}
    record = {**record, "state": "done", "red": red, "cells": cells}
    _write(folder, record, cells, text, config)
    return record


def _write(folder: RunFolder, record: dict[str, Any], cells: list[Cell], text: str, config: BenchConfig) -> None:
    write_json(folder / RECORD, record)  # first: nothing that comes after may cost it
    table = io.StringIO()
    flat = list(rows(cells))
    writer = csv.DictWriter(table, fieldnames=list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    write_text(folder / "cells.csv", table.getvalue())
    write_text(folder / "table.txt", text + "\n")
    hardware = record["hardware"]
    where = f"{config.threads} thread(s), {hardware['cpu']}" if config.device == "cpu" else hardware["gpus"][0]
    heads = f"{config.heads} heads of {config.head_dim}"
    title = f"{config.pattern}, batch {config.batch}, {heads}, {config.dtype}, {where}"
    draw_curves([folder / "curves.svg", folder / "curves.png"], cells, title)
    say(f"record      {folder / RECORD}\npictures    {folder / 'curves.svg'}, .png\ntable       {folder / 'cells.csv'}")
