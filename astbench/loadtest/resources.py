"""What a server's process takes, as its metrics tell. Imports nothing heavy."""

from __future__ import annotations

import re

_NAMES = {
    "cpu": "process_cpu_seconds_total",
    "rss": "process_resident_memory_bytes",
    "gpu_peak": "astbench_gpu_peak_bytes",
}


def resources(metrics: str) -> dict[str, float]:
    """CPU seconds, resident bytes, and the most bytes of a GPU so far; what it does not tell is left out."""
    found = {key: re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE) for key, name in _NAMES.items()}
    return {key: float(match[1]) for key, match in found.items() if match}


def gpu_peak(metrics: str) -> int | None:
    """The most bytes of a GPU since the server started; None without one."""
    found = resources(metrics).get("gpu_peak")
    return None if found is None else int(found)
