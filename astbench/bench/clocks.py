"""Seconds and peak bytes of a call, on the CPU and on CUDA."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONG_CALL = 5.0
"""Seconds; a first call that takes longer is itself counted, since a warm-up would change little."""
WARM_UP = 3
"""Calls on CUDA before the timed ones; the first compiles."""
FLUSH_BYTES = 256 * 2**20
"""Written before every timed call on CUDA, so that nothing of the last one is left in L2 (50 MB on an H100)."""

METHOD = {
    "cpu": "wall clock, after a first call; peak: resident memory of the process above the level before",
    "cuda": f"CUDA events, after {WARM_UP} calls; {FLUSH_BYTES >> 20} MiB written before every timed call, so that "
    "L2 holds none of its inputs; peak: torch.cuda.max_memory_allocated above the level before",
}
"""What the record says of how times were taken."""


def clock(call: Callable[[], Tensor], repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds of each call after the first ones, and a call's peak memory above the level before it.

    A call whose output is not finite gets an `error` instead.
    """
    return _clock_cuda(call, repeats) if device == "cuda" else _clock_cpu(call, repeats)


def _clock_cpu(call: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    before = reset_peak()
    start = time.perf_counter()
    out = call()
    first = time.perf_counter() - start
    peak = max(0, memory("VmHWM") - before)
    if not bool(out.isfinite().all()):
        return {"error": "the output is not finite"}
    del out
    if first > LONG_CALL:
        return {"seconds": [first], "peak_bytes": peak}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak_bytes": peak}


def _clock_cuda(call: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    if not bool(call().isfinite().all()):
        return {"error": "the output is not finite"}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = _events(call, flush)
    peak = torch.cuda.max_memory_allocated() - before
    if first > LONG_CALL:
        return {"seconds": [first], "peak_bytes": peak}
    for _ in range(WARM_UP - 2):
        call()
    return {"seconds": [_events(call, flush) for _ in range(repeats)], "peak_bytes": peak}


def _events(call: Callable[[], Tensor], flush: Tensor) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # While the device writes, the host runs ahead: of short calls it is the device's time that is measured.
    flush.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000


def reset_peak() -> int:
    """Forget the process's peak so far; returns the bytes resident now.

    What was freed goes back to the system first: a call that found it still resident would seem to need none.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024
