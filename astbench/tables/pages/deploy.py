"""Deployment tests: what each attention gains or loses at each length, and what every rate gave.

Attentions are compared request by request: the same prompts come at the same times. The comparison is at the lowest
rate, where requests hardly wait for one another; nearer to the knee they share their waits, and are no independent
draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from astbench.loadtest.knee import Knee, knee
from astbench.tables.layout import Row, Table
from astbench.tables.records import Group, Run
from astbench.tables.student import interval

if TYPE_CHECKING:
    from astbench.loadtest.client import Sent

FOR_INTERVAL = 20
"""Requests that both answered from which an interval is given."""

_CAPACITY = "capacity"

Number = Callable[["Sent"], "float | None"]


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Gains and losses, then every cell."""
    runs = _ordered([run for run in group.runs if run.record["config"]["rate"] != _CAPACITY])
    if not runs:
        return []
    alone = {_place(run): run for run in group.runs if run.record["config"]["rate"] == _CAPACITY}
    return [*_gains(group.name, runs, alone), *_rates(group.name, runs)]


def curves(runs: Sequence[Run]) -> dict[tuple[int, str], list[Run]]:
    """Length and server -> its cells by rate; the reference first."""
    found: dict[tuple[int, str], list[Run]] = {}
    for run in _ordered([run for run in runs if run.record["config"]["rate"] != _CAPACITY]):
        found.setdefault(_place(run), []).append(run)
    return found


def _place(run: Run) -> tuple[int, str]:
    return run.record["config"]["length"], run.record["config"]["server"]


def knee_of(cells: Sequence[Run]) -> Knee:
    """Up to which rate a server holds what is asked for, from its cells at one length."""
    share = cells[0].record["config"]["good_share"]
    return knee([(run.record["config"]["rate"], run.record["load"]["good_share"]) for run in cells], share)


def _ordered(runs: Sequence[Run]) -> list[Run]:
    def key(run: Run) -> tuple[int, bool, str, float]:
        config = run.record["config"]
        return config["length"], config["server"] != config["reference"], config["server"], config["rate"]

    return sorted(runs, key=key)


def _gains(name: str, runs: Sequence[Run], alone: Mapping[tuple[int, str], Run]) -> list[Table]:
    by_curve = curves(runs)
    reference = str(runs[0].record["config"]["reference"])
    streamed = "ttft_seconds" in runs[0].record["load"]
    rows = []
    for (length, server), cells in by_curve.items():
        dense = by_curve.get((length, reference), [])
        pair = _lowest_common(cells, dense) if server != reference else None
        ratios = _ratios(*pair, streamed) if pair else _Ratios.none(streamed)
        best = max(run.record["load"]["goodput_per_second"] for run in cells)
        memory = max((run.memory or 0) for run in cells)
        row = (
            f"`{server}`",
            f"{length:,}",
            *_alone(alone.get((length, server)), alone.get((length, reference)), streamed),
            *ratios.said,
            knee_of(cells).said(),
            f"{best:.3g}",
            f"{memory / 2**30:.2f}" if memory else "",
            ratios.verdict,
        )
        rows.append(Row(row, (*cells, *(run for place, run in alone.items() if place == (length, server)))))
    times = ("first token", "a token after it") if streamed else ()
    head = (
        "served",
        "tokens",
        *(("alone: first token, s", "alone: a token, ms") if streamed else ("alone, s",)),
        f"capacity, requests a second (times {reference}'s)",
        *(f"at the lowest rate: {what}, times {reference}'s (95%)" for what in (*times, "whole answer")),
        "held up to, requests a second",
        "answered well a second, at most",
        "peak memory, GiB",
        f"whole answers beside {reference}'s",
    )
    first, times_end = 2 + (3 if streamed else 2), len(head) - 4
    parts = {
        "alone": ("Alone, and as many at once as run together", range(2, first)),
        "gains": (f"At the lowest rate, beside {reference}", [*range(first, times_end), len(head) - 1]),
        "knee": ("Up to the knee", range(times_end, len(head) - 1)),
    }
    return _cut(name, parts, 2, head, rows)


def _alone(run: Run | None, reference: Run | None, streamed: bool) -> tuple[str, ...]:
    """What a request takes that comes alone, and how many are answered a second when many come at once."""
    if run is None:
        return ("",) * (3 if streamed else 2)
    took, capacity = run.record["alone"], run.record["load"]["throughput_per_second"]
    times: tuple[str, ...] = (f"{took['latency']:.3g}",)
    if streamed:  # a text of one token has no time a token
        times = (f"{took['ttft']:.3g}", f"{1000 * took['tpot']:.3g}" if "tpot" in took else "-")
    over = (
        f" ({capacity / reference.record['load']['throughput_per_second']:.2f})" if reference not in (None, run) else ""
    )
    return (*times, f"{capacity:.3g}{over}")


class _Ratios:
    """Times of one server over another's: cells of a table, and a verdict on the whole answer."""

    def __init__(self, said: Sequence[str], verdict: str) -> None:
        self.said, self.verdict = tuple(said), verdict

    @classmethod
    def none(cls, streamed: bool) -> _Ratios:
        return cls([""] * (3 if streamed else 1), "")


def _lowest_common(cells: Sequence[Run], dense: Sequence[Run]) -> tuple[Run, Run] | None:
    """Cells of the lowest rate at which both got the same requests."""

    def same(run: Run) -> tuple[Any, ...]:
        return tuple(run.record["config"][key] for key in ("rate", "requests", "output", "seed"))

    theirs = {same(run): run for run in dense}
    common = [run for run in cells if same(run) in theirs]
    return (common[0], theirs[same(common[0])]) if common else None


def _ratios(one: Run, other: Run, streamed: bool) -> _Ratios:
    """The geometric mean of the requests' ratios, with Student's interval over the requests that both answered."""
    from astbench.loadtest.kept import read_rows

    mine, theirs = (read_rows(run.items()["load"]) for run in (one, other))
    numbers: list[Number] = [lambda row: row.latency]
    if streamed:
        numbers = [lambda row: row.first_token, lambda row: row.per_token, *numbers]
    said, verdict = [], ""
    for number in numbers:
        pairs = [(number(a), number(b)) for a, b in zip(mine, theirs, strict=True) if a.ok and b.ok]
        logs = [math.log(a / b) for a, b in pairs if a and b]
        if not logs:
            said.append("none answered by both")
            verdict = "not compared: no request answered by both"
            continue
        ends = None
        if len(logs) >= FOR_INTERVAL:
            ends = interval(logs) if stdev(logs) else (fmean(logs),) * 2
        said.append(_times(fmean(logs), ends, len(logs)))
        verdict = _verdict(fmean(logs), ends)
    return _Ratios(said, verdict)


def _times(middle: float, ends: tuple[float, float] | None, count: int) -> str:
    if ends is None:
        return f"{math.exp(middle):.2f} ({count} requests)"
    return f"{math.exp(middle):.2f} ({math.exp(ends[0]):.2f} to {math.exp(ends[1]):.2f})"


def _verdict(middle: float, ends: tuple[float, float] | None) -> str:
    told = "slower" if middle > 0 else "faster"
    if ends is None:
        return f"{told}, of too few requests for an interval"
    return "not told apart" if ends[0] <= 0 <= ends[1] else told


def _rates(name: str, runs: Sequence[Run]) -> list[Table]:
    streamed = "ttft_seconds" in runs[0].record["load"]
    most = max(runs, key=lambda run: len(run.record["load"]["latency_seconds"])).record["load"]["latency_seconds"]
    rows = []
    for run in runs:
        config, load, server = (run.record[part] for part in ("config", "load", "server"))
        tokens = [*_ps(load["ttft_seconds"], most), *_ps(load["tpot_seconds"], ["p50"], 1000)] if streamed else []
        tokens += [_value(load["itl_seconds"].get("p95"), 1000), f"{load['tokens_per_second']:.3g}"] if streamed else []
        row = (
            f"`{config['server']}`, {config['length']:,} tokens",
            f"{config['rate']:.3g}",
            str(load["requests"]),
            str(load["requests"] - load["answered"]),
            f"{load['throughput_per_second']:.3g}",
            f"{load['goodput_per_second']:.3g}",
            f"{100 * load['good_share']:.0f}",
            *_ps(load["latency_seconds"], most),
            _slo(load["slo_seconds"]),
            *tokens,
            "" if server["cores_busy"] is None else f"{server['cores_busy']:.2f}",
            _each(server["cpu_seconds"], load["answered"]),
            "" if run.memory is None else f"{run.memory / 2**30:.2f}",
        )
        rows.append(Row(row, (run,)))
    of_tokens = [f"first token {q}, s" for q in most] + ["a token p50, ms", "between tokens p95, ms", "tokens a second"]
    head = (
        "served",
        "rate, requests a second",
        "requests",
        "failed",
        "answered a second",
        "answered well a second",
        "answered well, %",
        *(f"whole answer {q}, s" for q in most),
        "good within, s",
        *(of_tokens if streamed else ()),
        "cores busy",
        "CPU seconds an answer",
        "peak memory, GiB",
    )
    whole = 8 + len(most)
    parts = {
        "rates": ("Every rate", range(2, 7)),
        "answers": ("Every rate: whole answers", range(7, whole)),
        "tokens": ("Every rate: tokens", range(whole, len(head) - 4)),
        "resources": ("Every rate: what it took", range(len(head) - (4 if streamed else 3), len(head))),
    }
    return _cut(name, parts, 2, head, rows)


def _cut(
    name: str,
    parts: Mapping[str, tuple[str, Sequence[int]]],
    keys: int,
    head: Sequence[str],
    rows: Sequence[Row],
) -> list[Table]:
    """Several tables that fit a page: the first `keys` columns each, then a part's, unless it has none."""
    return [
        Table(
            f"{name}.{part}",
            caption,
            (*head[:keys], *(head[column] for column in columns)),
            1,
            tuple(Row((*row.cells[:keys], *(row.cells[column] for column in columns)), row.runs) for row in rows),
        )
        for part, (caption, columns) in parts.items()
        if columns
    ]


def _each(seconds: float | None, answered: int) -> str:
    return "" if seconds is None or not answered else f"{seconds / answered:.3g}"


def _slo(said: Mapping[str, float]) -> str:
    names = {"latency": "whole", "ttft": "first", "tpot": "a token"}
    return ", ".join(f"{names[name]} {seconds:.3g}" for name, seconds in said.items())


def _ps(found: Mapping[str, Any], shown: Sequence[str] | Mapping[str, Any], unit: float = 1) -> list[str]:
    return [_value(found.get(q), unit) for q in shown]


def _value(found: Mapping[str, Any] | None, unit: float = 1) -> str:
    """A percentile; "never" where it falls on a request that failed, `-` where too few came for it."""
    if found is None:
        return "-"
    return "never" if found["value"] is None else f"{unit * found['value']:.3g}"
