"""Growth: how time, memory and loss of an attention go with the length and with the model's size.

Each column is the slope of log y over log x, fitted to all runs of an attention at once with an own intercept for each
group of runs that differ in nothing else, and Student's interval of that slope over the runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

from astbench.tables.layout import Row, Table
from astbench.tables.pages.sweeps import settings_of
from astbench.tables.records import Group, Run
from astbench.tables.student import slope

Number = Callable[[Run], float]


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """The runs, which commands repeat, and a row an attention."""
    by_attention: dict[str, list[Run]] = {}
    for run in group.runs:
        options = {**run.attention, **run.entry.also}
        by_attention.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(run)
    rows = []
    for runs in by_attention.values():
        told = (
            _growth(runs, _length, _time_of_a_token, _size),
            _growth(runs, _length, _memory, _size),
            _growth(runs, _parameters, _loss, lambda run: str(_length(run))),
            _growth(runs, _parameters, _time_of_a_token, lambda run: str(_length(run))),
        )
        rows.append(Row((f"`{runs[0].attention['name']}`", str(len(runs)), *told), tuple(runs)))
    rows.sort(key=lambda row: (row.cells[0] != "`dense`", row.cells[0]))
    head = (
        "attention",
        "runs",
        "time a token, over length",
        "peak memory, over length",
        "loss, over parameters",
        "time a token, over parameters",
    )
    growth = Table(f"{group.name}.growth", "Exponents of growth (95%, Student over the runs)", head, 1, tuple(rows))
    return [_runs(group), growth]


def _growth(runs: Sequence[Run], x: Number, y: Number, alike: Callable[[Run], str]) -> str:
    points = [(alike(run), math.log(x(run)), math.log(y(run))) for run in runs]
    found = slope(points)
    if found is None:
        return "-"
    middle, low, high = found
    return f"{middle:+.2f}" if low is None or high is None else f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


def _runs(group: Group) -> Table:
    """What the exponents were fitted to: means over the seeds."""
    rows = []
    for setting in settings_of(group.runs):
        first = setting.runs[0]

        def mean(value: Number, runs: Sequence[Run] = setting.runs) -> float:
            return sum(map(value, runs)) / len(runs)

        cells = (
            f"`{first.attention['name']}`",
            f"{_size(first)}, {mean(_parameters) / 1e6:.2f}",
            f"{_length(first):,.0f}",
            f"{mean(lambda run: run.density):.3f}",
            f"{mean(lambda run: run.metrics['perplexity']):.1f}",
            f"{1e6 * mean(_time_of_a_token):.1f}",
            f"{mean(_memory) / 2**20:,.0f}",
        )
        rows.append(Row(cells, setting.runs))
    rows.sort(key=lambda row: (row.cells[0] != "`dense`", row.cells[0], _parameters(row.runs[0]), _length(row.runs[0])))
    seeds = sorted({len(row.runs) for row in rows})
    head = (
        "attention",
        "model, 10^6 parameters",
        "tokens",
        "density",
        "perplexity a token",
        "training, µs a token",
        "peak memory, MiB",
    )
    said = f"The runs, means over {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds"
    return Table(f"{group.name}.runs", said, head, 2, tuple(rows))


def _size(run: Run) -> str:
    return str(run.record["config"]["backbone"]["name"])


def _length(run: Run) -> float:
    return float(run.record["config"]["data"]["context"])


def _parameters(run: Run) -> float:
    return float(run.record["parameters"]["total"])


def _loss(run: Run) -> float:
    return run.metrics["nll"]


def _memory(run: Run) -> float:
    if run.memory is None:
        raise KeyError("peak_memory")
    return float(run.memory)


def _time_of_a_token(run: Run) -> float:
    """Seconds of a training step over its tokens, the median step."""
    data = run.record["config"]["data"]
    return float(run.record["train"]["step_ms"][1]) / 1000 / (data["context"] * data["batch_size"])
