"""Threads of torch in a process whose model runs beside the main thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes in this thread alone.

    Each thread that computes with several gets helpers of its own, which stay. Once there are more of them than cores
    OpenMP lets them sleep between calls: a model that runs in the engine's thread took up to half as long again, after
    the main thread had loaded it with helpers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
