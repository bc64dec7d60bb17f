"""What the page shows, as plain data: from records, their tables, and what lies in run folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astbench.bench import analysis
from astbench.errors import DataError
from astbench.files.paths import other_kind
from astbench.files.text import read_text
from astbench.runs.folder import EXPLORER, METRICS
from astbench.tables import labels
from astbench.tables.defaults import flatten
from astbench.tables.documents import Book
from astbench.tables.integrity import check_options
from astbench.tables.layout import Table
from astbench.tables.records import RECORD, Entry, Group, Run, read_record
from astbench.tables.repeat import repeat
from astbench.tasks.table import TASKS

LOWER = ("perplexity", "word_perplexity", "recall_perplexity", "nll", "bits_per_byte")
"""Metrics of which less is better."""

LENGTHS = ("context", "max_length", "length")
"""Options of data that say how long an input is."""

OWN = "runs"
"""The group of runs that were given one by one."""


def contents(book: Book, folders: Sequence[Path], *, alone: bool = False) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        book: Records in groups, their tables, and the recipes that repeat them.
        folders: Of runs, to be shown too.
        alone: Show nothing else.

    Raises:
        DataError: a record that cannot be read, or no record at all.
    """
    own = [read_run(folder) for folder in folders]
    groups = {} if alone else book.groups
    runs = [run for group in groups.values() for run in group.runs] + own
    benches = [run for run in runs if run.record["command"] == "bench"]
    scored = [run for run in runs if run.record["command"] != "bench" and run.record.get("metrics")]
    tables = book.tables if groups else {}
    return {
        "groups": [
            _group(group, tables.get(group.name, [])) for group in groups.values() if group.runs
        ] + ([{"name": OWN, "title": "Runs given one by one", "scope": "", "tables": []}] if own else []),
        "runs": [_run(run, book, groups) for run in scored],
        "benches": [_bench(run) for run in benches],
        "patterns": {_id(run): explorer for run in scored if (explorer := _explorer(run))},
    }  # fmt: skip


def read_run(folder: Path) -> Run:
    """The finished run of a folder.

    Raises:
        DataError: no record there, or one that did not end well.
    """
    if not (folder / RECORD).is_file():
        raise DataError(f"{folder} is not the folder of a run: it holds no {RECORD}{other_kind(folder)}")
    record = read_record(folder / RECORD)
    if record["state"] != "done":
        raise DataError(f"{folder} ended as {record['state']}: only finished runs are shown")
    check_options(folder / RECORD, record)
    return Run(OWN, folder.resolve().name, folder, record, Entry(record["config_hash"]))


def _id(run: Run) -> str:
    return f"{run.group}/{run.name}"


def _has_page(run: Run) -> bool:
    """Cells of a deployment test have none: their tables say all of it."""
    return run.record["command"] != "deploy-test"


def _group(group: Group, tables: Sequence[Table]) -> dict[str, Any]:
    return {
        "name": group.name,
        "title": group.title,
        "scope": group.scope,
        "left_out": group.left_out,
        "tables": [
            {
                "caption": table.caption,
                "head": table.head,
                "words": table.words,
                "rows": [
                    {"cells": row.cells, "runs": [_id(run) for run in row.runs if _has_page(run)]} for row in table.rows
                ],
            }
            for table in tables
        ],
    }


def _run(run: Run, book: Book, groups: dict[str, Group]) -> dict[str, Any]:
    record, config = run.record, run.record["config"]
    task = config["task"]["name"]
    metric = TASKS[task].metric if task in TASKS else next(iter(run.metrics))
    data = config.get("data", {})
    train = record.get("train") or {}
    return {
        **_origin(run),
        "label": labels.described(run).replace("`", ""),
        "attention": run.attention["name"],
        "learned": labels.learned(run),
        "task": task,
        "metric": metric,
        "value": run.metrics.get(metric),
        "lower": metric in LOWER,
        "metrics": run.metrics,
        "signature": record.get("signature", ""),
        "density": (record.get("density") or {}).get("mean"),
        "tiles": run.tiles,
        "layers": (record.get("density") or {}).get("layers", {}),
        "causal": record.get("strictly_causal"),
        "backbone": config.get("backbone", {}).get("name"),
        "length": next((data[name] for name in LENGTHS if data.get(name)), None),
        "parameters": (record.get("parameters") or {}).get("total"),
        "own_parameters": (record.get("parameters") or {}).get("attention"),
        "steps": train.get("steps", 0),
        "train_seconds": train.get("wall_seconds"),
        "memory": run.memory,
        "backends": record.get("backends", []),
        "stale": run.entry.stale,
        "repeat": _repeat(run, book),
        "config": flatten(config),
        "curves": _curves(run.folder / METRICS),
    }


def _origin(run: Run) -> dict[str, Any]:
    record = run.record
    hardware = record.get("hardware", {})
    return {
        "id": _id(run),
        "group": run.group,
        "seed": record.get("seed"),
        "date": run.date,
        "command": record["command"],
        "commit": str(record.get("git", {}).get("commit") or ""),
        "dirty": bool(record.get("git", {}).get("dirty")),
        "device": ", ".join(map(str, hardware.get("gpus", []))) or str(hardware.get("cpu", "")),
        "threads": hardware.get("threads"),
        "hash": record["config_hash"],
    }


def _repeat(run: Run, book: Book) -> str:
    return repeat(run, book.read_recipes if book.recipes.is_dir() else []).line()


def _bench(run: Run) -> dict[str, Any]:
    """Time and memory of every attention and mode over the length."""
    cells = run.record["cells"]
    series = []
    for name in dict.fromkeys(cell["attention"] for cell in cells):
        for mode in analysis.modes_of(cells):
            for variant in analysis.variants(cells, name, mode):
                seconds = analysis.medians(cells, name, variant)
                if seconds:
                    series.append(
                        {
                            "name": name,
                            "mode": variant,
                            "dense": analysis.is_dense(name),
                            "seconds": sorted(seconds.items()),
                            "bytes": sorted(analysis.peaks(cells, name, variant).items()),
                            "density": sorted(analysis.densities(cells, name, variant).items()),
                        }
                    )
    return {**_origin(run), "pattern": run.record["config"].get("pattern", ""), "series": series}


def _curves(file: Path) -> dict[str, list[list[float]]]:
    """Metric -> its (step, value) pairs; of a file that a killed run cut short, the whole lines."""
    if not file.is_file():
        return {}
    found: dict[str, list[list[float]]] = {}
    for row in csv.DictReader(read_text(file).splitlines()):
        for name, value in row.items():
            try:
                point = [float(row["step"]), float(value)]
            except (KeyError, TypeError, ValueError):
                continue
            if name not in ("step", "epoch"):
                found.setdefault(name, []).append(point)
    return found


def _explorer(run: Run) -> dict[str, Any] | None:
    if not (run.folder / EXPLORER).is_file():
        return None
    found = run.beside(EXPLORER)
    if found.get("schema") != 1:
        raise DataError(f"{run.folder / EXPLORER} is none of what `astbench analyze` writes")
    return found
