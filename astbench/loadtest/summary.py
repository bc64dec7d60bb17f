"""What a load test found, in the field's usual numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from astbench.loadtest.client import Sent
from astbench.loadtest.objective import Objective

FOR_P99 = 1000
"""Requests from which a 99th percentile is given: ten lie above it."""

_RESAMPLED = 1000


def summary(sent: Sequence[Sent], seconds: float, slo: Objective, seed: int = 0) -> dict[str, Any]:
    """Latencies from when requests were due, throughput, goodput, failures.

    A request that failed has no latency that could be averaged; it counts as one that took for ever. So percentiles are
    over all requests, and None where they fall on one that failed. Of answers that were streamed there is also the time
    to the first token (`ttft_seconds`), the time a token after it (`tpot_seconds`, a mean of each answer) and the gaps
    between tokens (`itl_seconds`, of answers that came to their end).

    Args:
        sent: Every request.
        seconds: For how long requests were due.
        slo: What a good answer is.
        seed: Of the intervals' resampling.
    """
    latency = np.array([row.latency for row in sent])
    answered = int(np.isfinite(latency).sum())
    end = max([seconds, *(row.done for row in sent)])
    lag = np.array([row.sent - row.due for row in sent])
    good = sum(map(slo.met, sent))
    return {
        "requests": len(sent),
        "answered": answered,
        "outcomes": dict(sorted(Counter(row.outcome for row in sent).items())),
        "offered_per_second": len(sent) / seconds,
        "throughput_per_second": answered / end,
        "goodput_per_second": good / end,
        "good_share": good / len(sent) if sent else None,
        "slo_seconds": slo.said(),
        "latency_seconds": _percentiles(latency, seed),
        **_of_tokens(sent, end, seed),
        "client_lag_seconds": {"p50": _finite(lag, 50), "max": float(lag.max())} if sent else {},
    }


def _of_tokens(sent: Sequence[Sent], end: float, seed: int) -> dict[str, Any]:
    """Of answers that came token by token; empty where none did."""
    if not any(row.tokens for row in sent):
        return {}
    gaps = [b - a for row in sent if row.ok for a, b in pairwise(row.tokens)]
    return {
        "tokens_per_second": sum(len(row.tokens) for row in sent if row.ok) / end,
        "ttft_seconds": _percentiles(np.array([x for row in sent if (x := row.first_token) is not None]), seed),
        "tpot_seconds": _percentiles(np.array([x for row in sent if (x := row.per_token) is not None]), seed),
        "itl_seconds": {f"p{q}": {"value": _finite(np.array(gaps), q)} for q in _shown(len(gaps))} if gaps else {},
    }


def _shown(count: int) -> list[int]:
    return [50, 95] + [99] * (count >= FOR_P99)


def _percentiles(values: np.ndarray, seed: int) -> dict[str, dict[str, float | None]]:
    return {f"p{q}": _percentile(values, q, seed) for q in _shown(len(values)) if len(values)}


def _percentile(values: np.ndarray, q: int, seed: int) -> dict[str, float | None]:
    """With its 95% interval, by resampling the requests."""
    draws = np.random.default_rng(seed).choice(values, (_RESAMPLED, len(values)))
    found = np.sort(np.percentile(draws, q, axis=1, method="higher"))
    low, high = found[int(0.025 * _RESAMPLED)], found[int(0.975 * _RESAMPLED) - 1]
    return {"value": _finite(values, q), "low": _number(low), "high": _number(high)}


def _finite(values: np.ndarray, q: int) -> float | None:
    return _number(np.percentile(values, q, method="higher"))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
