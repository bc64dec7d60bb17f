"""Cost curves of attention layers: which cells to measure, in what order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Protocol

from astbench.bench.analysis import KERNEL, Cell
from astbench.bench.config import BenchConfig, words
from astbench.errors import ConfigError
from astbench_registry import PluginError, load_plugin, registered
from astbench_registry.configs.block_selection import BlockSelectionConfig
from astbench_registry.registry import config_class, make_config

DENSE_ON_CUDA = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn", "xformers")
"""Dense kernels that may be the fastest somewhere; `sdpa_math` holds all pairs in memory and never is."""


@dataclass(frozen=True)
class Entry:
    """One curve: an attention with its options.

    Attributes:
        label: Its name in tables.
        name: The attention.
        options: Laid over its defaults.
        modes: Of the layer: forward, training, decode.
        lists: What its kernel runs on, see `BenchConfig`; "" for attentions without lists of blocks.
        peers: Backends timed on the same lists.
    """

    label: str
    name: str
    options: Mapping[str, Any]
    modes: tuple[str, ...] = ("forward", "training")
    lists: str = ""
    peers: tuple[str, ...] = ()

    @property
    def asked(self) -> list[str]:
        """Every mode of layer, kernel and peers that a cell is measured in."""
        kernels = [KERNEL[mode] for mode in self.modes] if self.lists else []
        peers = [f"{kernel}@{peer}" for kernel in kernels for peer in self.peers]
        return [*(self.modes if self.lists in ("", "layer") else ()), *kernels, *peers]


class Measures(Protocol):
    """What measures a cell: :class:`astbench.bench.processes.Worker`."""

    def measure(self, cell: Cell, seconds: float | None) -> dict[str, Any]:
        """Measure within so many seconds."""
        ...


def chosen(config: BenchConfig, say: Callable[[str], None]) -> list[Entry]:
    """What to measure, `dense` first; what cannot serve the shape or a mode is left out with the reason.

    Raises:
        ConfigError: options for an attention that is not measured, peers that are no backends, nothing to measure.
        RegistryError: an unknown name.
    """
    for plugin in config.plugins:
        load_plugin(plugin)
    asked = list(registered()) if config.attention == "all" else words(config.attention)
    stray = sorted(set(config.options) - {*asked, "dense"})
    if stray:
        raise ConfigError(f"--options speaks of {stray[0]}, which --attention={config.attention} does not measure")
    if config.peers:
        from astbench_kernels import sparse_backends  # imports torch

        if unknown := sorted(set(words(config.peers)) - set(sparse_backends())):
            raise ConfigError(f"--peers has no backend {unknown[0]!r}; choose from {', '.join(sparse_backends())}")
    found = _dense(config, say)
    for name in dict.fromkeys(asked):
        if name == "dense":
            continue
        try:
            found += _of_attention(name, config, say)
        except PluginError as error:
            if config.attention != "all":
                raise
            say(f"  {name} left out: {error}")  # somebody's package, which is in nobody else's way
    if not found:
        raise ConfigError("nothing is left to measure; change --attention, --modes or the shape")
    return found


def _dense(config: BenchConfig, say: Callable[[str], None]) -> list[Entry]:
    """Dense attention as it is asked for; on CUDA without a backend named, by every kernel that runs here."""
    options = config.options.get("dense", {})
    modes = tuple(words(config.modes))
    if config.device == "cpu" or "backend" in options:
        return [Entry("dense", "dense", options, modes)] if _serves("dense", options, config, say) else []
    from astbench_kernels import dense_backends

    found = []
    for backend in DENSE_ON_CUDA:
        label, with_backend = f"dense:{backend}", {**options, "backend": backend}
        reasons = dense_backends()[backend].device_refusals(config.device)
        if reasons:
            say(f"  {label} left out: {'; '.join(reasons)}")
        elif _serves("dense", with_backend, config, say, label):
            found.append(Entry(label, "dense", with_backend, modes))
    return found


def _serves(
    name: str, options: Mapping[str, Any], config: BenchConfig, say: Callable[[str], None], label: str = ""
) -> bool:
    can = make_config(name, options).can
    reasons = can.problems(
        config.pattern,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads or config.heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
    )
    if reasons:
        say(f"  {label or name} left out: {'; '.join(reasons)}")
    return not reasons


def _of_attention(name: str, config: BenchConfig, say: Callable[[str], None]) -> list[Entry]:
    """The curves of one attention: one a density and kind of lists, where it takes densities and has lists."""
    options = config.options.get(name, {})
    if not _serves(name, options, config, say):
        return []
    can = make_config(name, options).can
    modes = tuple(words(config.modes))
    if "decode" in modes and not (can.decode and "causal_self" in can.patterns):
        say(f"  {name}, decode, left out: with these options it does not decode")
        modes = tuple(mode for mode in modes if mode != "decode")
    draws = issubclass(config_class(name), BlockSelectionConfig)
    kinds = [kind for kind in words(config.lists) if kind == "layer" or draws]
    if not modes or not kinds:
        say(f"  {name} left out: it has none of --modes={config.modes} with --lists={config.lists}")
        return []
    variants: list[tuple[str, dict[str, Any]]] = [(name, dict(options))]
    if config.densities and "density" in {f.name for f in fields(config_class(name))}:
        variants = [(f"{name} {d:g}", {**options, "density": d}) for d in config.densities]
    peers = tuple(words(config.peers)) if can.yields_layout else ()
    return [
        Entry(
            label if kind == "layer" else f"{label}, {kind} lists",
            name,
            with_density,
            modes,
            kind if can.yields_layout else "",
            peers,
        )
        for label, with_density in variants
        for kind in kinds
    ]


def red(name: str, config: BenchConfig) -> str:
    """Why the attention may not be timed: what the conformance suite finds on the CPU; empty when it is green.

    A backend that is named is tried there too, if it can be: on CUDA what is timed is held against the reference
    (:func:`astbench.bench.gates.wrong`).
    """
    backend = config.options.get(name, {}).get("backend") if config.device == "cpu" else None
    return _red(name, backend)


@cache
def _red(name: str, backend: str | None) -> str:
    from astbench_registry.conformance import check

    failed = [r for r in check(name, {"backend": backend} if backend else {}) if r.status == "fail"]
    return f"conformance: {failed[0].property} fails ({failed[0].detail})" if failed else ""


def measure(config: BenchConfig, entries: list[Entry], say: Callable[[str], None], worker: Measures) -> list[Cell]:
    """Go through all cells `rounds` times, shuffled within each length; pool the samples."""
    cells: dict[tuple[str, int], Cell] = {}
    order = random.Random(config.seed)
    end = time.monotonic() + config.time_limit if config.time_limit else None
    for number in range(config.rounds):
        for length in sorted(config.lengths):
            for entry in order.sample(entries, len(entries)):
                new = {"attention": entry.label, "length": length, "asked": entry.asked}
                cell = cells.setdefault((entry.label, length), new)
                left = None if end is None else end - time.monotonic()
                why = _not_now(config, cells, entry, length, left)
                if not why:
                    _add(cell, worker.measure(_order(config, entry, length, gate=number == 0), left))
                elif number == 0:
                    cell["left_out"] = why
            say(f"  round {number + 1}/{config.rounds}, {length} tokens")
    return [cells[entry.label, length] for entry in entries for length in sorted(config.lengths)]


def _not_now(
    config: BenchConfig, cells: dict[tuple[str, int], Cell], entry: Entry, length: int, left: float | None
) -> str:
    """Why a cell is not measured (again): too long by the length before, failed there, no time; empty if it is."""
    if left is not None and left <= 0:
        return f"no time was left of {config.time_limit:g} s (--time_limit)"
    expected = _expected(cells, entry, length)
    if expected > config.max_seconds:
        return f"a call would take about {expected:.0f} s (--max_seconds)"
    for (label, n), cell in sorted(cells.items()):
        if label == entry.label and n <= length and _failed(cell, entry):
            return f"not tried, it failed at {n:,} tokens"
    return ""


def _expected(cells: dict[tuple[str, int], Cell], entry: Entry, length: int) -> float:
    """Seconds of the longest call, at most quadratic in the length, by the longest length measured before."""
    longest = {
        n: max((s for mode in entry.asked for s in cell.get(mode, {}).get("seconds", [])), default=0.0)
        for (label, n), cell in cells.items()
        if label == entry.label and n < length
    }
    last = max((n for n, seconds in longest.items() if seconds), default=0)
    return longest[last] * (length / last) ** 2 if last else 0.0


def _failed(cell: Cell, entry: Entry) -> bool:
    """Nothing of this cell could be measured: neither it nor a longer one is tried again."""
    return "died" in cell or all("error" in cell.get(mode, {}) for mode in entry.asked)


def _order(config: BenchConfig, entry: Entry, length: int, *, gate: bool) -> Cell:
    """A cell as the worker takes it."""
    names = "pattern batch heads head_dim dtype device threads repeats max_memory_gib plugins seed".split()
    return {
        **{name: getattr(config, name) for name in names},
        "kv_heads": config.kv_heads or config.heads,
        "attention": entry.name,
        "options": dict(entry.options),
        "modes": list(entry.modes),
        "asked": entry.asked,
        "lists": entry.lists,
        "peers": list(entry.peers),
        "length": length,
        "gate": gate,
    }


def _add(cell: Cell, found: dict[str, Any]) -> None:
    """Pool the samples of another round; what failed once stays failed."""
    for key, value in found.items():
        before = cell.get(key)
        if key in cell["asked"] and before is not None:
            if "seconds" in value and "seconds" in before:
                before["seconds"] += value["seconds"]
                before["peak_bytes"] = max(before["peak_bytes"], value["peak_bytes"])
            elif "error" in value:
                cell[key] = value
        else:
            cell[key] = value
