"""Is a run that was repeated the one on record: bit for bit, within what chance explains, or another. Plain Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astbench.tables.defaults import flatten
from astbench.tables.integrity import OF_A_CORPUS
from astbench.tables.records import Record, Run
from astbench.tables.repeat import NO_EFFECT, TRAINS
from astbench.tables.student import interval, quantile

_OF_WINDOWS = ("perplexity", "nll")

OF_THE_MACHINE = (
    ("torch", ("versions", "torch")),
    ("transformers", ("versions", "transformers")),
    ("processor", ("hardware", "cpu")),
    ("vector unit", ("hardware", "cpu_capability")),
    ("threads", ("hardware", "threads")),
    ("GPUs", ("hardware", "gpus")),
    ("precision", ("precision",)),
    ("commit", ("git", "commit")),
)
"""What may change a number without any option changing, and where a record says it."""


@dataclass(frozen=True)
class Score:
    """One metric, on record and now.

    Attributes:
        held: The record's.
        now: The repeated run's; None where it has no such metric.
        low: The interval that it should lie in; None where there is nothing to make one of.
        high: Its other end.
        of: What the interval is made of.
    """

    name: str
    held: float
    now: float | None
    low: float | None
    high: float | None
    of: str

    @property
    def same(self) -> bool:
        """To the last bit."""
        return self.held == self.now

    @property
    def inside(self) -> bool:
        """The same, or within the interval."""
        if self.now is None or self.same or self.low is None or self.high is None:
            return self.same
        return self.low <= self.now <= self.high

    def __str__(self) -> str:
        if self.same:
            return f"{self.name} {self.held:.6g}: the same"
        if self.now is None:
            return f"{self.name} {self.held:.6g} is missing now"
        if self.low is None or self.high is None:
            return f"{self.name} {self.held:.6g} on record, {self.now:.6g} now: no interval, {self.of}"
        where = "inside" if self.inside else "OUTSIDE"
        ends = f"{self.low:.6g} to {self.high:.6g} ({self.of})"
        return f"{self.name} {self.held:.6g} on record, {self.now:.6g} now: {where} {ends}"


@dataclass(frozen=True)
class Verdict:
    """What a repetition says of a record.

    Attributes:
        scores: Each metric of the record.
        exact: Every metric and every item is the same, to the last bit.
        other_data: How the examples differ; empty where they are the same.
        other_options: Options that decide what is computed and differ.
        other_machine: What else differs.
    """

    scores: tuple[Score, ...]
    exact: bool
    other_data: str
    other_options: tuple[str, ...]
    other_machine: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """The same options and examples, and every metric inside."""
        return not self.other_data and not self.other_options and all(score.inside for score in self.scores)

    def lines(self) -> list[str]:
        """For a reader."""
        told = [str(score) for score in self.scores]
        if self.other_data:
            told.append(f"other examples: {self.other_data}")
        if self.other_options:
            told.append(f"other options, so another experiment: {'; '.join(self.other_options)}")
        if self.other_machine:
            told.append(f"other: {'; '.join(self.other_machine)}")
        if self.exact:
            return [*told, "REPRODUCED bit for bit"]
        return [*told, "REPRODUCED within its interval" if self.holds else "NOT REPRODUCED"]


def verdict(run: Run, seeds: Sequence[Run], record: Record, items: Mapping[str, Any]) -> Verdict:
    """Hold a repeated run against the one on record.

    Args:
        run: On record.
        seeds: Runs on record of the same options, `run` among them, each with another seed.
        record: Of the repeated run.
        items: What it was scored with, one by one.
    """
    held = run.items()
    metrics = record.get("metrics") or {}
    scores = tuple(_score(name, value, metrics.get(name), run, seeds, held) for name, value in run.metrics.items())
    same_items = _scores_of(held) == _scores_of(items)
    other = _other_data(run.record, record)
    options = tuple(_other_options(run, record))
    return Verdict(
        scores=scores,
        exact=same_items and not other and not options and all(score.same for score in scores),
        other_data=other,
        other_options=options,
        other_machine=tuple(_other_machine(run.record, record)),
    )


def _scores_of(items: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that records of before lack."""
    return {key: row.get("nll", row) if isinstance(row, dict) else row for key, row in items.items()}


def _score(
    name: str, held: float, now: float | None, run: Run, seeds: Sequence[Run], items: Mapping[str, Any]
) -> Score:
    if len(seeds) > 1:
        values = [one.metrics[name] for one in seeds if name in one.metrics]
        return Score(name, held, now, *_of_one_more(values), f"95% of a further seed, from {len(values)} on record")
    found = over_items(name, held, items)
    if found is not None:
        low, high, count = found
        what = "windows" if name in _OF_WINDOWS else "items"
        return Score(name, held, now, low, high, f"95% over {count} {what} of the record")
    return Score(name, held, now, None, None, "one seed, and its items do not give it")


def over_items(name: str, value: float, items: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """Student's 95% interval of a metric over what was scored one by one, and how many that are.

    Args:
        name: The metric's.
        value: The record's.
        items: The record's.

    Returns: None where the items do not give the metric, or there is one.
    """
    rows = [row for row in items.values() if isinstance(row, dict)]
    if name in _OF_WINDOWS and len(rows) > 1 and all("nll" in row for row in rows):
        tokens = [row["tokens"] for row in rows] if all("tokens" in row for row in rows) else None
        low, high = interval([row["nll"] for row in rows], weights=tokens)
        return (low, high, len(rows)) if name == "nll" else (math.exp(low), math.exp(high), len(rows))
    if name not in OF_A_CORPUS and len(rows) > 1 and all(name in row for row in rows):
        low, high = interval([float(row[name]) for row in rows])
        scale = value / mean if (mean := statistics.fmean(float(row[name]) for row in rows)) else 1.0
        return low * scale, high * scale, len(rows)
    return None


def _of_one_more(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Where one more value of the same kind lies, 95 times of 100 (Student's prediction interval)."""
    if len(values) < 2:
        return None, None
    half = quantile(0.975, len(values) - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def _other_data(held: Record, now: Record) -> str:
    """How the fingerprints of the examples differ, where both records have them."""
    before, after = (_fingerprints(record) for record in (held, now))
    return "; ".join(
        f"{split} {before[split]} on record, {after[split]} now"
        for split in before
        if split in after and before[split] != after[split]
    )


PLACES = ("run_dir", "init_from", "data.path", "data.num_workers", "backbone.name", "attention.backend")
"""Options that say where something lies or which kernel runs, and not what is computed."""


def _other_options(run: Run, now: Record) -> Iterator[str]:
    """Options that both records have, and that are not the same; the trainer's own are the machine's."""
    held, found = {**flatten(run.record["config"]), **run.entry.also}, flatten(now["config"])
    for key, value in held.items():
        ours = not key.startswith("trainer.") or key in TRAINS
        if ours and key in found and found[key] != value and key not in (*PLACES, *NO_EFFECT):
            yield f"--{key} {value} on record, {found[key]} now"


def _fingerprints(record: Record) -> dict[str, str]:
    data = record.get("data") or {}
    found = dict(data.get("fingerprints") or {})
    if "fingerprint" in (data.get("train") or {}):
        found["train"] = data["train"]["fingerprint"]
    if "fingerprint" in data:
        found[str(record.get("split", "evaluated"))] = data["fingerprint"]
    return found


def _other_machine(held: Record, now: Record) -> list[str]:
    told = []
    for what, path in OF_THE_MACHINE:
        before, after = _at(held, path), _at(now, path)
        if before != after:
            told.append(f"{what} {_short(what, before)} on record, {_short(what, after)} now")
    return told


def _at(record: Record, path: Sequence[str]) -> Any:
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _short(what: str, value: Any) -> str:
    return str(value)[:12] if what == "commit" else str(value)
