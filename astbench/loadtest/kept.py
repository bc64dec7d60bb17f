"""Requests as a file beside a record keeps them, and what they say: whoever reads them again finds the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from astbench.loadtest.client import Sent
from astbench.loadtest.objective import Objective
from astbench.loadtest.summary import summary


def rows(sent: Sequence[Sent]) -> dict[str, dict[str, Any]]:
    """Requests as plain data, by their number; times to a tenth of a millisecond."""
    return {
        f"{number:05}": {
            "due": round(row.due, 4),
            "sent": round(row.sent, 4),
            "done": round(row.done, 4),
            "outcome": row.outcome,
            **({"tokens": [round(at, 4) for at in row.tokens]} if row.tokens else {}),
        }
        for number, row in enumerate(sent)
    }


def read_rows(found: Mapping[str, Mapping[str, Any]]) -> list[Sent]:
    """The requests that :func:`rows` has written.

    Raises:
        KeyError, TypeError, ValueError: they were written by something else.
    """
    return [
        Sent(row["due"], row["sent"], row["done"], str(row["outcome"]), tuple(row.get("tokens", ())))
        for _, row in sorted(found.items())
    ]


def load_part(items: Mapping[str, Any], objective: Objective, seed: int) -> dict[str, Any]:
    """What kept requests say: `load`, and `alone` where some came one by one.

    Args:
        items: Name -> what :func:`rows` has written.
        objective: What a good answer is.
        seed: Of the intervals' resampling.
    """
    sent = read_rows(items["load"])
    seconds = max(row.due for row in sent) or max(row.done for row in sent)  # all at once: until the last was answered
    part: dict[str, Any] = {"load": summary(sent, seconds, objective, seed)}
    if "alone" in items:
        part["alone"] = _alone(read_rows(items["alone"]))
    return part


def _alone(sent: Sequence[Sent]) -> dict[str, float]:
    found = {"latency": [row.latency for row in sent]}
    found["ttft"] = [x for row in sent if (x := row.first_token) is not None]
    found["tpot"] = [x for row in sent if (x := row.per_token) is not None]
    return {name: round(median(values), 5) for name, values in found.items() if values}
