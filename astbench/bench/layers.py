"""Cost curves of attention layers: which cells to measure, in what order, and what comes of them."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from astbench.bench.config import BenchConfig
from astbench.errors import ConfigError
from astbench_registry import load_plugin, registered
from astbench_registry.registry import config_class, make_config

MODES = ("forward", "training")
KERNEL_MODES = ("kernel", "kernel_training")
"""The block-sparse kernel alone, forward and with backward, on the lists that the layer chose."""
GROWTH_FROM = 2048
"""Exponents are fitted from this length on; below, what does not grow still shows."""

Cell = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One curve: an attention with its options."""

    label: str
    name: str
    options: Mapping[str, Any]


def chosen(config: BenchConfig, say: Callable[[str], None]) -> list[Entry]:
    """What to measure, `dense` first; attentions that cannot serve the shape are left out with the reason.

    Raises:
        ConfigError: options for an attention that is not measured.
        RegistryError: an unknown name.
    """
    for plugin in config.plugins:
        load_plugin(plugin)
    asked = list(registered()) if config.attention == "all" else [n for n in config.attention.split(",") if n]
    stray = sorted(set(config.options) - {*asked, "dense"})
    if stray:
        raise ConfigError(f"--options speaks of {stray[0]}, which --attention={config.attention} does not measure")
    found = []
    for name in dict.fromkeys(["dense", *asked]):
        options = config.options.get(name, {})
        takes_density = "density" in {f.name for f in fields(config_class(name))}
        can = make_config(name, options).can
        reasons = can.problems(
            config.pattern,
            num_heads=config.heads,
            num_kv_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
        )
        if reasons:
            say(f"  {name} left out: {'; '.join(reasons)}")
        elif takes_density and config.densities:
            found += [Entry(f"{name} {d:g}", name, {**options, "density": d}) for d in config.densities]
        else:
            found.append(Entry(name, name, options))
    return found


def red(name: str, config: BenchConfig) -> str:
    """Why the attention may not be timed: what the conformance suite finds; empty when it is green."""
    from astbench_registry.conformance import check

    backend = {k: v for k, v in config.options.get(name, {}).items() if k == "backend"}
    failed = [r for r in check(name, backend) if r.status == "fail"]
    return f"conformance: {failed[0].property} fails ({failed[0].detail})" if failed else ""


def measure(config: BenchConfig, entries: list[Entry], say: Callable[[str], None]) -> list[Cell]:
    """Go through all cells `rounds` times, shuffled within each length, a process each; pool the samples."""
    cells: dict[tuple[str, int], Cell] = {}
    order = random.Random(config.seed)
    for number in range(config.rounds):
        for length in sorted(config.lengths):
            for entry in order.sample(entries, len(entries)):
                name = entry.label
                cell = cells.setdefault((name, length), {"attention": name, "length": length})
                expected = _expected(cells, name, length)
                if expected > config.max_seconds:
                    cell["left_out"] = f"a call would take about {expected:.0f} s (--max_seconds)"
                elif not _failed(cells, name, length):
                    _add(cell, _run(config, entry, length))
            say(f"  round {number + 1}/{config.rounds}, {length} tokens")
    return [cells[entry.label, length] for entry in entries for length in sorted(config.lengths)]


def _expected(cells: dict[tuple[str, int], Cell], name: str, length: int) -> float:
    """Seconds of the longest call, at most quadratic in the length, by the longest length measured before."""
    shorter = [n for (other, n), cell in cells.items() if other == name and n < length and "training" in cell]
    if not shorter:
        return 0.0
    last = max(shorter)
    seconds = [s for mode in MODES for s in cells[name, last].get(mode, {}).get("seconds", [])]
    return max(seconds, default=0.0) * (length / last) ** 2


def _failed(cells: dict[tuple[str, int], Cell], name: str, length: int) -> bool:
    """This cell failed in an earlier round, or a shorter one did."""
    return any(
        "error" in cell.get("forward", {}) or cell.get("died")
        for (other, n), cell in cells.items()
        if other == name and n <= length
    )


def _run(config: BenchConfig, entry: Entry, length: int) -> dict[str, Any]:
    options = asdict(config)
    cell = {
        **{
            k: options[k]
            for k in "pattern batch heads head_dim dtype threads repeats max_memory_gib plugins seed".split()
        },
        "kv_heads": config.kv_heads or config.heads,
        "attention": entry.name,
        "options": dict(entry.options),
        "length": length,
    }
    done = subprocess.run(
        [sys.executable, "-m", "astbench.bench.worker"], input=json.dumps(cell), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        short = "MemoryError" in last or "alloc" in last or done.returncode == -9
        return {"died": "out of memory" if short else last[:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _add(cell: Cell, found: dict[str, Any]) -> None:
    """Pool the samples of another round."""
    for key, value in found.items():
        if key in (*MODES, *KERNEL_MODES) and "seconds" in value and "seconds" in cell.get(key, {}):
            cell[key]["seconds"] += value["seconds"]
            cell[key]["peak_bytes"] = max(cell[key]["peak_bytes"], value["peak_bytes"])
        else:
            cell[key] = value


def summary(cell: Cell, mode: str) -> dict[str, Any]:
    """Median and quartiles in seconds, count, peak bytes; or `why` there is none."""
    found = cell.get(mode, {})
    if "seconds" not in found:
        return {"why": found.get("error") or cell.get("died") or cell.get("left_out") or "not measured"}
    times = sorted(found["seconds"])
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {
        "median": statistics.median(times),
        "q1": low,
        "q3": high,
        "count": len(times),
        "peak_bytes": found["peak_bytes"],
    }


def medians(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> median seconds of what was measured."""
    found = {c["length"]: summary(c, mode) for c in cells if c["attention"] == name}
    return {length: s["median"] for length, s in found.items() if "median" in s}


def peaks(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> peak bytes, where a call took any that the process did not hold already."""
    found = {c["length"]: summary(c, mode) for c in cells if c["attention"] == name}
    return {length: float(s["peak_bytes"]) for length, s in found.items() if s.get("peak_bytes")}


def exponent(points: dict[int, float]) -> float | None:
    """B of the least-squares fit y = a * length^b over lengths of `GROWTH_FROM` and more; None below 3 points."""
    pairs = [(math.log(n), math.log(y)) for n, y in points.items() if n >= GROWTH_FROM and y > 0]
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) >= 3 else None


def ratio(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> R = time / (density x time of dense): 1 where skipping work saves as much time as work.

    Only for attentions that compute part of the visible pairs, as counted in the measured call.
    """
    dense = medians(cells, "dense", _OF_LAYER.get(mode, mode))
    density = {c["length"]: c.get("density", 1.0) for c in cells if c["attention"] == name}
    own = medians(cells, name, mode)
    return {n: t / (density[n] * dense[n]) for n, t in own.items() if n in dense and density[n] < 1}


_OF_LAYER = dict(zip(KERNEL_MODES, MODES, strict=True))


def choosing(cells: list[Cell], name: str, mode: str) -> dict[int, float]:
    """Length -> share of the layer's time that is not the kernel's: choosing, and learning to choose."""
    kernel = dict(zip(MODES, KERNEL_MODES, strict=True))[mode]
    layer, alone = medians(cells, name, mode), medians(cells, name, kernel)
    return {n: max(0.0, 1 - alone[n] / layer[n]) for n in layer if n in alone}


def crossover(cells: list[Cell], name: str, mode: str) -> float | None:
    """The length from which on it is faster than dense, between measured ones by straight lines in log-log.

    None where it never is, is at every length, or is only now and then.
    """
    dense, own = medians(cells, "dense", mode), medians(cells, name, mode)
    both = sorted(set(dense) & set(own))
    gaps = [math.log(own[n] / dense[n]) for n in both]
    changes = [i for i in range(1, len(both)) if (gaps[i] < 0) != (gaps[i - 1] < 0)]
    if len(changes) != 1 or gaps[-1] >= 0:
        return None
    left, right = changes[0] - 1, changes[0]
    part = gaps[left] / (gaps[left] - gaps[right])
    return math.exp(math.log(both[left]) + part * math.log(both[right] / both[left]))


def against_dense(cells: list[Cell], name: str, mode: str) -> str:
    """From which length on it is faster than dense, in words."""
    dense, own = medians(cells, "dense", mode), medians(cells, name, mode)
    both = sorted(set(dense) & set(own))
    if not both:
        return "not measured"
    wins = [n for n in both if own[n] < dense[n]]
    if not wins:
        return f"slower than dense at every length up to {both[-1]:,}"
    if wins != both[both.index(wins[0]) :]:
        return f"faster than dense at {', '.join(f'{n:,}' for n in wins)} only"
    return f"faster than dense from {wins[0]:,} on" if wins[0] != both[0] else "faster than dense at every length"


def rows(cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """One flat row a cell and mode, for CSV."""
    for cell in cells:
        for mode in (*MODES, *(m for m in KERNEL_MODES if m in cell)):
            yield {
                "attention": cell["attention"],
                "length": cell["length"],
                "mode": mode,
                **{k: summary(cell, mode).get(k, "") for k in ("median", "q1", "q3", "count", "peak_bytes", "why")},
                **{k: cell.get(k, "") for k in ("flops", "state_size", "parameters", "backend", "density")},
            }
