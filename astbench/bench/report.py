"""The measured cells as text."""

from __future__ import annotations

from collections.abc import Iterator

from astbench.bench import analysis
from astbench.bench.analysis import Cell
from astbench.bench.config import BenchConfig, words

WIDTH = 14
"""Of a length's column."""
TITLES = {"forward": "forward", "training": "training (forward, backward, own losses)", "decode": "decode, one token"}


def report(cells: list[Cell], config: BenchConfig) -> str:
    """Medians and quartiles by length, growth, the verdict against dense; then what follows; then what is missing."""
    names = list(dict.fromkeys(cell["attention"] for cell in cells))
    lengths = sorted({c["length"] for c in cells})
    labels = [_label(cell["attention"], mode) for cell in cells for mode in analysis.asked(cell)]
    wide = max(14, *map(len, labels)) + 2
    lines: list[str] = []
    for mode in analysis.modes_of(cells):
        lines += ["", f"{TITLES[mode]}: ms, median and below it the quartiles; growth: exponent fitted from "]
        lines[-1] += f"{analysis.GROWTH_FROM:,} tokens on"
        lines.append(_row("", [f"{n:,}" for n in lengths], wide) + f"{'growth':>8}{'memory growth':>15}  against dense")
        for name in names:
            for variant in analysis.variants(cells, name, mode):
                lines += _times(cells, name, variant, lengths, wide)
        best = analysis.best_dense(cells, mode)
        if any(name != "dense" for name in best.values()):
            lines.append(_row("fastest dense", [best.get(n, "-").removeprefix("dense:") for n in lengths], wide))
    lines += _efficiency(cells, names, config, wide)
    absent = [f"  {place}: {why}" for place, why in analysis.missing(cells)]
    return "\n".join([*lines, *(["", "not measured:", *absent] if absent else [])])


def _row(name: str, values: list[str], wide: int) -> str:
    return f"{name:<{wide}}" + "".join(f" {value:>{WIDTH - 1}}" for value in values)


def _times(cells: list[Cell], name: str, mode: str, lengths: list[int], wide: int) -> Iterator[str]:
    """A line of medians with growth and verdict, and one of quartiles."""
    times, peaks = analysis.medians(cells, name, mode), analysis.peaks(cells, name, mode)
    low, high = (analysis.summaries(cells, name, mode, quartile) for quartile in ("q1", "q3"))
    fits = (analysis.exponent(times), analysis.exponent(peaks))
    growth, memory = ("-" if fit is None else f"{fit:.2f}" for fit in fits)
    verdict = "" if analysis.is_dense(name) else analysis.against_dense(cells, name, mode)
    if crossing := analysis.crossover(cells, name, mode):
        verdict += f" (curves cross at about {crossing:,.0f})"
    values = [_number(1000 * times[n]) if n in times else "-" for n in lengths]
    yield f"{_row(_label(name, mode), values, wide)}{growth:>8}{memory:>15}  {verdict}".rstrip()
    if times:
        between = {n: f"{_number(1000 * low[n])}-{_number(1000 * high[n])}" for n in low}
        yield _row("", [between.get(n, "") for n in lengths], wide)


def _label(name: str, mode: str) -> str:
    """The layer by its name, its kernel and the peers by theirs."""
    whole, _, peer = mode.partition("@")
    return name if whole == analysis.layer_mode(mode) else f"{name} kernel{'@' + peer if peer else ''}"


def _number(value: float) -> str:
    """Three or four figures."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _efficiency(cells: list[Cell], names: list[str], config: BenchConfig, wide: int) -> list[str]:
    """A line a row and length: rates, R, memory against dense, what choosing costs, and the peers."""
    peers = words(config.peers)
    columns = ["tokens", "density", "R", "TFLOP/s", "GB/s", "memory", "choosing", *(f"over {peer}" for peer in peers)]
    lines = []
    for mode in analysis.modes_of(cells):
        for name in names:
            for variant in analysis.variants(cells, name, mode):
                rates = _rates(cells, name, variant, peers)
                for length in analysis.summaries(cells, name, variant, "tflops"):
                    values = [f"{length:,}"]
                    values += [_number(rate[length]) if length in rate else "-" for rate in rates]
                    lines.append(_row(f"{_label(name, variant)} {mode}", values, wide + 9))
    head = [
        "",
        "R = time / (density x time of the fastest dense), 1 is ideal; TFLOP/s: counted kept pairs x 4 head_dim, in",
        "training x 3.5; GB/s: the fewest bytes such a call must move; memory: peak over that of the fastest dense;",
        "choosing: share of the layer's time outside the kernel",
        _row("", columns, wide + 9),
    ]
    return [*head, *lines] if lines else []


def _rates(cells: list[Cell], name: str, mode: str, peers: list[str]) -> list[dict[int, float]]:
    dense, layer = analysis.is_dense(name), mode == analysis.layer_mode(mode)
    kernel = mode in analysis.KERNEL.values()
    return [
        analysis.densities(cells, name, mode),
        {} if dense else analysis.ratio(cells, name, mode),
        analysis.summaries(cells, name, mode, "tflops"),
        analysis.summaries(cells, name, mode, "gbs"),
        {} if dense else analysis.memory(cells, name, mode),
        analysis.choosing(cells, name, mode) if layer else {},
        *(analysis.over_peer(cells, name, mode, peer) if kernel else {} for peer in peers),
    ]
