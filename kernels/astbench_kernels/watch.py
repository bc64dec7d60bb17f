"""Who wants to know of every call of the block-sparse kernel: a counter of work, say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from astbench_kernels.layout import BlockLayout


@dataclass(frozen=True)
class KernelCall:
    """What :func:`astbench_kernels.block_sparse_attention` was called with, as far as its work depends on it.

    Attributes:
        q: Queries, `(batch, heads, query_length, head_dim)`.
        v: Values, `(batch, kv_heads, key_length, value_dim)`.
        layout: The lists.
        causal: Whether a query sees no later key.
        key_valid: Bool `(batch, key_length)`, or None.
        gradients: Whether a backward pass may follow.
    """

    q: Tensor
    v: Tensor
    layout: BlockLayout
    causal: bool
    key_valid: Tensor | None
    gradients: bool


Watcher = Callable[[KernelCall], AbstractContextManager[None]]

_watchers: list[Watcher] = []


@contextmanager
def watching_kernels(watcher: Watcher) -> Iterator[None]:
    """Within, every call of the kernel runs inside what `watcher` returns for it."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def watched(call: KernelCall) -> Iterator[None]:
    """Run a call inside what all watchers return for it."""
    with ExitStack() as stack:
        for watcher in _watchers:
            stack.enter_context(watcher(call))
        yield
