"""lm-eval's results as a record holds them: its own numbers, and each item by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from astbench.tasks.harness.prompts import Prompt

WRITTEN = 2000
"""Characters of an answer that an item holds."""


def metrics_of(results: Mapping[str, Any], items: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every number of every task and group under `TASK/METRIC`, as lm-eval says it; before them their `score`.

    `score` is the mean over all items of what heads their task, for tables that compare item by item; there is none
    where a task's items have no number, or a lower one is better.
    """
    found: dict[str, float] = {}
    if items and all("score" in item for item in items.values()):
        found["score"] = fmean(item["score"] for item in items.values())
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value) and not _unasked(metric, value):
                found[f"{task}/{_named(metric, chosen)}"] = float(value)
    return found


def items_of(results: Mapping[str, Any], prompts: Iterable[Prompt]) -> dict[str, dict[str, Any]]:
    """`TASK/NUMBER` -> what was asked, what came, and its numbers; the same names whatever the attention."""
    lengths: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        lengths.setdefault((prompt.task, prompt.item), []).append(prompt)
    found: dict[str, dict[str, Any]] = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            number = int(sample["doc_id"])
            row = found.setdefault(f"{task}/{number}", {})
            asked = lengths.get((task, number), [])
            if not row:
                row |= {
                    "prompt_sha256": sample["prompt_hash"],
                    "prompt_tokens": max((len(prompt.ids) for prompt in asked), default=None),
                    "cut": max((prompt.cut for prompt in asked), default=0),
                    "target": str(sample["target"])[:WRITTEN],
                    "answer": _answer(sample["filtered_resps"]),
                    "metrics": {},
                }
            row["metrics"] |= dict(_numbers(sample))
            heading = _heading(sample, results["higher_is_better"].get(task) or {})
            if heading is not None and "score" not in row:
                row["score"] = heading
    return found


def _numbers(sample: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for metric in sample["metrics"]:
        value = sample[metric]
        if _is_number(value) and not _unasked(metric, value):
            yield _named(metric, sample["filter"]), float(value)


def _heading(sample: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> float | None:
    """An item's first metric, if it is a number of which more is better."""
    for metric in sample["metrics"]:
        value = sample[metric]
        if _is_number(value) and _unasked(metric, value):
            continue
        return float(value) if _is_number(value) and higher_is_better.get(metric, True) else None
    return None


def _unasked(metric: str, value: float) -> bool:
    """RULER's metrics are called by the length of a text, and are -1 for items of another one."""
    return metric.isdecimal() and value == -1


def _named(metric: str, chosen: str) -> str:
    """With the filter of the answer that it is of, where there is one."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _answer(found: Any) -> Any:
    """What was written, or the log-likelihood of each choice and whether it is the likeliest text."""
    if len(found) == 1 and isinstance(found[0], str):
        return found[0][:WRITTEN]
    return [
        [round(float(x), 6) if isinstance(x, float) else x for x in part] if isinstance(part, tuple) else part
        for part in found
    ]
