"""Floating-point operations of a model with a swapped attention, the attention's own share apart.

A multiply-add is two operations. Only matmuls, convolutions and attention kernels are counted, as in
:mod:`torch.utils.flop_counter`, whose formulas these are: no softmax, norm, top-k, rotary position or optimizer.

* The model's own layers: what that counter sees, forward and backward.
* torch's fused attention: its formula, times the share of pairs that the causal flag or the mask shows. The counter
  alone would charge dense attention for pairs that no kernel needs to compute.
* The block-sparse kernel: from its lists, not from what a backend did. 2 (head_dim + value_dim) operations for each
  pair that they name; of carried lists, for each pair in the tiles that they name, since a kernel computes tiles whole.
  A backward pass takes five matmuls for the forward pass's two. A CPU schedule that computes all pairs and picks the
  listed ones does more.
* Beside it, choosing what to attend to: everything else that the attention does and the counter sees, forward and
  backward, distillation too.

What no counter sees: Triton's fused scoring, and dense kernels of other packages (xformers, flash-attn).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import bmm_flop, flop_registry

from astbench.backbones.swap import SwapHandle
from astbench_kernels.watch import KernelCall, watching_kernels

BACKWARD = 2.5
"""Matmuls of an attention kernel's backward pass over those of its forward pass: five for two."""

_FUSED = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""torch's fused kernels; `_backward` follows the names of their backward passes."""


@dataclass
class Work:
    """Operations of the model without its attention, of attending, and of what the attention does beside (choosing)."""

    model: float = 0.0
    attending: float = 0.0
    beside: float = 0.0


class FlopCount:
    """Counts what runs within :meth:`counting`.

    Args:
        handle: Of the swapped attention.

    Attributes:
        work: Of all that ran within.
    """

    def __init__(self, handle: SwapHandle) -> None:
        self._handle = handle
        self.work = Work()
        self._in_attention = self._in_kernel = 0
        # Autograd nodes are numbered as they are made: whose backward pass runs shows by the number.
        self._attention_nodes: list[tuple[int, int]] = []
        self._kernel_nodes: list[tuple[int, int]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, every operation counts, of backward passes too. No result changes."""
        self._attention_nodes.clear()
        self._kernel_nodes.clear()
        with ExitStack() as stack:
            for slot in self._handle.slots:
                start: list[int] = []
                stack.callback(slot.register_forward_pre_hook(self._enter(start)).remove)
                stack.callback(slot.register_forward_hook(self._leave(start), always_call=True).remove)
            stack.enter_context(watching_kernels(self._kernel))
            stack.enter_context(_Operations(self._seen))
            yield

    def _enter(self, start: list[int]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._in_attention += 1
            start.append(torch.autograd._get_sequence_nr())

        return hook

    def _leave(self, start: list[int]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._in_attention -= 1
            self._attention_nodes.append((start.pop(), torch.autograd._get_sequence_nr()))

        return hook

    @contextmanager
    def _kernel(self, call: KernelCall) -> Iterator[None]:
        """Whatever a backend does inside is not counted; what the lists ask of it is."""
        again = torch._C._current_graph_task_id() != -1  # checkpointing repeats the forward call for the one backward
        self.work.attending += kernel_flops(call) * (1 + BACKWARD if call.gradients and not again else 1)
        first = torch.autograd._get_sequence_nr()
        self._in_kernel += 1
        try:
            yield
        finally:
            self._in_kernel -= 1
            self._kernel_nodes.append((first, torch.autograd._get_sequence_nr()))

    def _seen(self, operations: float, attends: bool) -> None:
        """Some have run, in a kernel of attention or not: whose were they."""
        if self._belongs(self._in_kernel, self._kernel_nodes):
            return
        if not self._belongs(self._in_attention, self._attention_nodes):
            self.work.model += operations
        elif attends:
            self.work.attending += operations
        else:
            self.work.beside += operations

    @staticmethod
    def _belongs(inside: int, nodes: list[tuple[int, int]]) -> bool:
        """Whether what runs now is in such a forward call, or in the backward pass of one."""
        if inside:
            return True
        node = torch._C._current_autograd_node()
        if node is None:
            return False
        number = node._sequence_nr()
        return any(first <= number < end for first, end in nodes)


def kernel_flops(call: KernelCall) -> float:
    """Operations of a forward call of the block-sparse kernel, by its lists."""
    layout, heads = call.layout, call.q.shape[1]
    if layout.since is None:
        pairs = layout.attended_pairs(causal=call.causal, key_valid=call.key_valid)
    else:
        pairs = layout.tiles(causal=call.causal)[0] * layout.query_group * layout.block_size
    batch, lists = pairs.shape
    copies = call.q.shape[0] / batch * heads / lists
    return float(pairs.sum()) * copies * 2 * (call.q.shape[-1] + call.v.shape[-1])


class _Operations(TorchDispatchMode):
    """Tells of every operation that torch has a formula for.

    torch's own FlopCounterMode also takes kernels apart that have a plain form beside (the gradient of SiLU, say),
    and a training step would come out with other last digits.
    """

    def __init__(self, seen: Callable[[float, bool], None]) -> None:
        super().__init__()
        self._tell = seen
        self._fused = _fused_formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if torch.is_inference_mode_enabled() and packet not in flop_registry and _is_composite(func.name()):
            with self:  # what autograd would have taken apart before it came here
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if packet in self._fused:
            self._tell(self._fused[packet](*args, **kwargs), True)
        elif packet in flop_registry:
            self._tell(float(flop_registry[packet](*args, **kwargs, out_val=out)), False)
        return out


@cache
def _is_composite(name: str) -> bool:
    """Whether an operation is made of others and has no kernel of its own."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CompositeImplicitAutograd") and not (has(name, "CPU") or has(name, "CUDA"))


def _fused_formulas() -> dict[Any, Callable[..., float]]:
    found: dict[Any, Callable[..., float]] = {}
    for name in _FUSED:
        for kernel, factor in ((name, 1.0), (f"{name}_backward", BACKWARD)):
            if (packet := getattr(torch.ops.aten, kernel, None)) is not None:
                found[packet] = _fused_formula(packet, factor)
    return found


def _fused_formula(packet: Any, factor: float) -> Callable[..., float]:
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, **kwargs: Any) -> float:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (given[name].shape for name in ("query", "key", "value"))  # (batch, heads, length, size)
        rows, keys = q[2], k[2]
        whole = bmm_flop((q[0] * q[1], rows, q[3]), (q[0] * q[1], q[3], keys)) + bmm_flop(
            (q[0] * q[1], rows, keys), (q[0] * q[1], keys, v[3])
        )
        return float(factor * whole * _shown(given, rows, keys))

    return count


def _shown(given: dict[str, Any], rows: int, keys: int) -> float:
    """Share of the pairs that the causal flag or the mask shows."""
    mask = given.get("attn_mask") if given.get("attn_mask") is not None else given.get("attn_bias")
    share = 1.0
    if isinstance(mask, Tensor):
        share = float((mask if mask.dtype == torch.bool else mask > -torch.inf).double().mean())
    if given.get("is_causal"):
        square = min(rows, keys)
        share *= (square * (square + 1) / 2 + (rows - square) * keys) / (rows * keys)
    return share
