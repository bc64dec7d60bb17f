"""`astbench bench`: time and memory of attention layers over the length, each measured in its own process."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from astbench.bench.config import BenchConfig
from astbench.console import say
from astbench.errors import ConfigError
from astbench.explain import explain
from astbench.runs.files import write_json, write_text
from astbench.runs.folder import RECORD, RunFolder, default_run_dir

if TYPE_CHECKING:
    from astbench.bench.layers import Entry


def run(words: list[str]) -> int:
    """Measure, print, and leave record, CSV and plot in the run folder; 1 when an attention's gate is red."""
    config = _parse(words)
    from astbench.bench import layers

    entries = layers.chosen(config, say)
    folder, record = _begin(config, words)
    try:
        return _measure(config, entries, folder, record)
    except BaseException as error:
        ended = {"state": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        write_json(folder / RECORD, {**record, **ended})
        raise
    finally:
        folder.close()


def _measure(config: BenchConfig, entries: list[Entry], folder: Any, record: dict[str, Any]) -> int:
    from astbench.bench import layers

    names = list(dict.fromkeys(entry.name for entry in entries))
    say(f"{len(names)} attentions, {config.pattern}, {config.heads} heads of {config.head_dim}, {config.dtype}")
    say("conformance first: what fails is not timed")
    gates = {name: layers.red(name, config) for name in names}
    red = {name: why for name, why in gates.items() if why}
    for name, why in red.items():
        say(f"  {name}: {why}")
    if "dense" in red:
        raise ConfigError("dense, which all others are compared with, fails its conformance suite")
    green = [entry for entry in entries if entry.name not in red]
    cells = layers.measure(config, green, say)
    text = report(cells, [entry.label for entry in green])
    say(text)
    _end(folder, record, config, cells, red, text)
    return 1 if red else 0


def _parse(words: list[str]) -> BenchConfig:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="astbench bench", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(BenchConfig)
    try:
        given = parser.parse_args(words).as_dict()
        return BenchConfig(**{k: v for k, v in given.items() if k != "config"})
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"astbench bench: {explain(str(error))}") from error


def _begin(config: BenchConfig, words: list[str]) -> tuple[Any, dict[str, Any]]:
    from astbench.runs.record import new_record

    folder = RunFolder(config.run_dir or default_run_dir("bench", "layers"))
    folder.open_for_writing(resume=False)
    record = new_record("bench", asdict(config), config.seed, words)
    record["hardware"]["threads"] = config.threads
    write_json(folder / RECORD, record)
    return folder, record


def _end(
    folder: Any,
    record: dict[str, Any],
    config: BenchConfig,
    cells: list[dict[str, Any]],
    red: dict[str, str],
    text: str,
) -> None:
    from astbench.bench.layers import rows
    from astbench.bench.plot import draw_curves

    table = io.StringIO()
    flat = list(rows(cells))
    writer = csv.DictWriter(table, fieldnames=list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    write_text(folder / "cells.csv", table.getvalue())
    write_text(folder / "table.txt", text + "\n")
    title = f"{config.pattern}, batch {config.batch}, {config.heads} heads of {config.head_dim}, {config.dtype}, "
    draw_curves(folder / "curves.svg", cells, f"{title}{config.threads} thread(s), {record['hardware']['cpu']}")
    write_json(folder / RECORD, {**record, "state": "done", "red": red, "cells": cells})
    say(f"record      {folder / RECORD}\npicture     {folder / 'curves.svg'}\ntable       {folder / 'cells.csv'}")


def report(cells: list[dict[str, Any]], names: list[str]) -> str:
    """Medians per length, peak memory at the longest, fitted growth, and the verdict against dense."""
    from astbench.bench import layers

    lengths = sorted({c["length"] for c in cells})
    lines = []
    for mode in layers.MODES:
        head = "".join(f"{n:>10,}" for n in lengths)
        lines += ["", f"{mode}, ms (median; growth: exponent fitted from {layers.GROWTH_FROM:,} tokens on)"]
        lines.append(f"{'':<14}{head}{'growth':>8}{'memory growth':>15}  against dense")
        for name in names:
            times, peaks = layers.medians(cells, name, mode), layers.peaks(cells, name, mode)
            values = "".join(f"{times[n] * 1000:>10.1f}" if n in times else f"{'-':>10}" for n in lengths)
            fits = (layers.exponent(times), layers.exponent(peaks))
            growth, memory = ("-" if fit is None else f"{fit:.2f}" for fit in fits)
            verdict = "" if name == "dense" else layers.against_dense(cells, name, mode)
            if crossing := layers.crossover(cells, name, mode):
                verdict += f" (curves cross at about {crossing:,.0f})"
            lines.append(f"{name:<14}{values}{growth:>8}{memory:>15}  {verdict}")
    lines += _efficiency(cells, names, lengths)
    missing = [
        f"  {cell['attention']} at {cell['length']:,}, {mode}: {found['why']}"
        for cell in cells
        for mode in layers.MODES
        if "why" in (found := layers.summary(cell, mode))
    ]
    return "\n".join([*lines, *(["", "not measured:", *missing] if missing else [])])


def _efficiency(cells: list[dict[str, Any]], names: list[str], lengths: list[int]) -> list[str]:
    """R of kernel and layer, and what choosing costs, for attentions that compute part of the pairs."""
    from astbench.bench import layers

    head = "".join(f"{n:>10,}" for n in lengths)
    lines = ["", "R = time / (density x time of dense), 1 is ideal; choosing: share of the layer outside the kernel"]
    lines.append(f"{'':<14}{'':<18}{head}")
    for name in names:
        density = {c["length"]: c["density"] for c in cells if c["attention"] == name and "density" in c}
        rows = {"density": density}
        rows |= {f"R {_WORDS[mode]}": layers.ratio(cells, name, mode) for mode in _WORDS}
        rows |= {f"choosing {_WORDS[mode]}": layers.choosing(cells, name, mode) for mode in layers.MODES}
        for what, values in rows.items():
            if values:
                shown = "".join(f"{values[n]:>10.2f}" if n in values else f"{'-':>10}" for n in lengths)
                lines.append(f"{name if what == 'density' else '':<14}{what:<18}{shown}")
    return lines if len(lines) > 3 else []


_WORDS = {"kernel": "kernel", "kernel_training": "kernel+back", "forward": "forward", "training": "training"}
