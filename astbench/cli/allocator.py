"""Memory that torch has freed stays with the process.

glibc gives every large piece back to the kernel and asks for it again at the next call, which then faults once for
every 4 KB of it: a fifth of the time of attention on a CPU, and 5% of a training step of small models (docs/cpu.md).
"""

from __future__ import annotations

import ctypes
import os

_LARGEST = 2**25
"""Bytes from which a piece still goes back when it is freed: as far as glibc lets the bound be moved."""

_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_MMAP_THRESHOLD_": (-3, _LARGEST)}
"""Name in the environment; number in malloc.h, value."""


def keep_freed_memory() -> None:
    """Set it for this process and those that it starts, unless the environment says something else.

    Nothing happens where the C library is not glibc.
    """
    said = any(name in os.environ for name in _OPTIONS) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if said:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    for name, (number, value) in _OPTIONS.items():
        mallopt(number, value)
        os.environ[name] = str(value)
