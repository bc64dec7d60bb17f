"""Benches: time and memory of layers over the length, of one decoded token, and of AST's kernel against dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from astbench.bench import analysis
from astbench.tables.layout import Row, Table
from astbench.tables.pages.cells import crossover, exponent, losing
from astbench.tables.records import Group, Run

PASSES = {"forward": "forward", "training": "forward and backward"}
"""Modes of a bench, and how a caption calls them."""


def cost(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Forward, forward and backward, and memory: a table each."""
    return [*(_times(group, mode) for mode in PASSES), _memory(group)]


def _times(group: Group, mode: str) -> Table:
    lengths = columns(group)
    rows = []
    for run, name in _attentions(group):
        times = analysis.medians(run.record["cells"], name, mode)
        shown = [f"{1000 * times[n]:,.1f}" if n in times else "-" for n in lengths]
        verdict = _verdict(run, name, mode)
        rows.append(Row((f"`{name}`", *shown, exponent(analysis.exponent(times)), verdict), (run,)))
    head = ("attention", *(f"{n:,} tokens, ms" for n in lengths), "growth (exponent)", "against dense")
    return Table(f"{group.name}.{mode}", f"Time of one layer, {PASSES[mode]}", head, 1, tuple(rows))


def _memory(group: Group) -> Table:
    last = columns(group)[-1]
    rows = []
    for run, name in _attentions(group):
        line = [f"`{name}`"]
        for mode in PASSES:
            peaks = analysis.peaks(run.record["cells"], name, mode)
            line += [f"{peaks[last] / 2**20:,.0f}" if last in peaks else "-", exponent(analysis.exponent(peaks))]
        rows.append(Row(tuple(line), (run,)))
    heads = [head for what in PASSES.values() for head in (f"{what}: peak, MiB", f"{what}: growth (exponent)")]
    return Table(
        f"{group.name}.memory", f"Memory of one layer at {last:,} tokens", ("attention", *heads), 1, tuple(rows)
    )


def decode(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Time of one token with a KV cache."""
    lengths = columns(group)
    rows = []
    for run, name in _attentions(group):
        times = analysis.medians(run.record["cells"], name, "decode")
        shown = [f"{1000 * times[n]:.1f}" if n in times else "-" for n in lengths]
        rows.append(Row((f"`{name}`", *shown, _verdict(run, name, "decode")), (run,)))
    head = ("attention", *(f"{n:,} keys, ms" for n in lengths), "against dense")
    return [Table(group.name, group.title, head, 1, tuple(rows))]


def kernel(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """R of the kernel alone and of the whole layer, forward and with backward, and the layer's memory."""
    tables = []
    for mode, said in PASSES.items():
        tables.append(_ratios(group, analysis.KERNEL[mode], f"alone-{mode}", f"R of the kernel alone, {said}", False))
        tables.append(_ratios(group, mode, f"layer-{mode}", f"R of the whole layer, {said}", True))
    return [*tables, _over_dense(group)]


def _ratios(group: Group, mode: str, part: str, caption: str, verdict: bool) -> Table:
    lengths = columns(group)
    rows = []
    for run, name in _sparse(group):
        found = analysis.ratio(run.record["cells"], name, mode)
        shown = [f"{found[n]:.2f}" if n in found else "-" for n in lengths]
        ends = [_verdict(run, name, mode)] if verdict else [_kernel_density(run, name, lengths)]
        rows.append(Row((f"`{name}`", lists(run), *shown, *ends), (run,)))
    last = "against dense" if verdict else f"density at {lengths[len(lengths) // 2]:,}"
    head = ("attention", "lists", *(f"{n:,} tokens, R" for n in lengths), last)
    return Table(f"{group.name}.{part}", caption, head, 2, tuple(rows))


def _over_dense(group: Group) -> Table:
    lengths = columns(group)
    rows = []
    for run, name in _sparse(group):
        line = [f"`{name}`", lists(run)]
        for mode in PASSES:
            found = analysis.memory(run.record["cells"], name, mode)
            line += [f"{found[n]:.1f}" if n in found else "-" for n in lengths[1:]]
        rows.append(Row(tuple(line), (run,)))
    heads = [f"{said}: {n:,} tokens" for said in PASSES.values() for n in lengths[1:]]
    head = ("attention", "lists", *heads)
    return Table(f"{group.name}.memory", "Memory of the layer, peak over dense's", head, 2, tuple(rows))


def _kernel_density(run: Run, name: str, lengths: tuple[int, ...]) -> str:
    at = lengths[len(lengths) // 2]
    cell = next(c for c in run.record["cells"] if (c["attention"], c["length"]) == (name, at))
    return f"{cell['kernel']['density']:.3f}"


def lists(run: Run) -> str:
    """How many tokens share a list of key blocks, and how large those are."""
    config: dict[str, Any] = run.record["config"]
    options = config["options"]["ast"]
    causal = config["pattern"] == "causal_self"
    tile = options.get("query_tile", 64) if options.get("lists") == "carried" else None
    own = f"causal, lists carried in tiles of {tile}" if tile else "causal, a list a token"
    said = own if causal else f"{options.get('query_group', 64)} tokens share a list"
    return said + ("" if options["block_size"] == 64 else f", blocks of {options['block_size']}")


def columns(group: Group) -> tuple[int, ...]:
    """The lengths shown: those of the table.yaml, else the shortest, the middle and the longest."""
    if group.lengths:
        return group.lengths
    found = sorted({cell["length"] for run in group.runs for cell in run.record["cells"]})
    return tuple(dict.fromkeys((found[0], found[len(found) // 2], found[-1])))


def _attentions(group: Group) -> Iterator[tuple[Run, str]]:
    for run in group.runs:
        for name in dict.fromkeys(cell["attention"] for cell in run.record["cells"]):
            yield run, name


def _sparse(group: Group) -> Iterator[tuple[Run, str]]:
    return ((run, name) for run, name in _attentions(group) if not analysis.is_dense(name))


def _verdict(run: Run, name: str, mode: str) -> str:
    return "" if analysis.is_dense(name) else analysis.against_dense(run.record["cells"], name, mode)


def speed(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Each attention beside the fastest dense one, choosing included: how fast, from which length on, and where not."""
    lengths, tables = columns(group), []
    asked = dict.fromkeys(mode for run in group.runs for mode in analysis.modes_of(run.record["cells"]))
    for mode in asked:
        rows = []
        for run, name in _sparse(group):
            cells_of = run.record["cells"]
            found = analysis.speedup(cells_of, name, mode)
            if not found:
                continue
            shown = [f"{found[n]:.2f}" if n in found else "-" for n in lengths]
            rows.append(
                Row((f"`{name}`", *shown, crossover(cells_of, name, mode), losing(cells_of, name, mode)), (run,))
            )
        head = (
            "attention",
            *(f"{n:,} tokens, times as fast" for n in lengths),
            "faster from, tokens",
            "slower at, tokens",
        )
        if not rows:
            continue
        said = PASSES.get(mode, "one token with a KV cache")
        tables.append(
            Table(f"{group.name}.{mode}", f"The layer beside the fastest dense one, {said}", head, 1, tuple(rows))
        )
    return tables
