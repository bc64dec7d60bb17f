"""What a load test found, in the field's usual numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from astbench.loadtest.client import Sent

FOR_P99 = 1000
"""Requests from which a 99th percentile is given: ten lie above it."""

_RESAMPLED = 1000


def summary(sent: Sequence[Sent], seconds: float, slo: float, seed: int = 0) -> dict[str, Any]:
    """Latencies from when requests were due, throughput, goodput, failures.

    A request that failed has no latency that could be averaged; it counts as one that took for ever. So percentiles are
    over all requests, and None where they fall on one that failed.

    Args:
        sent: Every request.
        seconds: For how long requests were due.
        slo: Seconds within which an answer is good (the service-level objective).
        seed: Of the intervals' resampling.
    """
    latency = np.array([row.done - row.due if row.ok else np.inf for row in sent])
    end = max([seconds, *(row.done for row in sent)])
    lag = np.array([row.sent - row.due for row in sent])
    good = int((latency <= slo).sum())
    shown = [50, 95] + [99] * (len(sent) >= FOR_P99)
    return {
        "requests": len(sent),
        "answered": int(np.isfinite(latency).sum()),
        "outcomes": dict(sorted(Counter(row.outcome for row in sent).items())),
        "offered_per_second": len(sent) / seconds,
        "throughput_per_second": int(np.isfinite(latency).sum()) / end,
        "goodput_per_second": good / end,
        "good_share": good / len(sent) if sent else None,
        "slo_seconds": slo,
        "latency_seconds": {f"p{q}": _percentile(latency, q, seed) for q in shown if sent},
        "client_lag_seconds": {"p50": _finite(lag, 50), "max": float(lag.max())} if sent else {},
    }


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
