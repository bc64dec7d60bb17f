"""torch's fused attention kernel for CPUs, on keys that were gathered for it.

It keeps logits and weights in registers and cache, and multiplies bfloat16 by matrix instructions where the CPU has
them. It gives no gradient to a bias, and its backward pass is no faster than one in steps of plain torch.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from astbench_kernels.backends.cpu.units import ListedUnits, Scratch, lists_together
from astbench_kernels.dispatch import rules


def serves(q: Tensor, k: Tensor, v: Tensor, block_bias: Tensor | None) -> bool:
    """Whether torch's fused kernel computes the output of several rows; else plain torch does, on any device.

    float16 is left out: CPUs seldom multiply it any faster, and weights rounded to it overflow in a backward pass.
    """
    felt = block_bias is not None and bool((block_bias != 0).any())
    return q.device.type == "cpu" and q.dtype != torch.float16 and k.shape[-1] == v.shape[-1] and not felt


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp in float32 or float64; 0 and -inf for rows that see nothing.

    Args:
        q: `(batch, heads, rows, d)`.
        k: `(batch, heads, keys, d)`.
        v: As `k`.
        mask: In the dtype of `q`, `(batch, heads, rows, keys)`, added to the logits: 0 or -inf; None for 0 throughout.
        scale: Factor on `q . k`.
    """
    # Called by its own name it looks at no stride, and takes the last one for 1.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    # Of rows that see nothing it says 0; only then is the mask looked at, which is as large as the work.
    if mask is not None and not bool(((lse != 0) & lse.isfinite()).all()):
        blind = (mask == -torch.inf).all(-1)
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
    return out, lse


_kept = threading.local()  # bytes: at most 2 ROW_BYTES a thread


def room(elements: int, like: Tensor) -> Tensor:
    """Memory for gathered keys and values, the same at every call: asking for it would take longer than to fill it."""
    size = elements * like.element_size()
    if size > 2 * rules.ROW_BYTES:  # of one very long list
        return like.new_empty(elements)
    held: Tensor | None = getattr(_kept, "bytes", None)
    if held is None or len(held) < size:
        with torch.inference_mode(False):  # else it could not be used outside
            held = _kept.bytes = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(like.dtype)


def fused_units(queries: Tensor, keys: Tensor, values: Tensor, plan: ListedUnits) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each unit, its keys gathered.

    Args:
        queries: `(units, rows, d)` in the order of the units' numbers.
        keys: The block table, `(blocks, block_size * d)`.
        values: Likewise.
        plan: Of the call.
    """
    dim, rows = queries.shape[-1], plan.rows
    out = queries.new_zeros(queries.shape)
    lse = queries.new_full(queries.shape[:2], -torch.inf, dtype=torch.promote_types(queries.dtype, torch.float32))
    scratch = Scratch(queries)
    # A list's mask has as many numbers as its keys, or more.
    bytes_per_block = plan.layout.block_size * max(rows, dim) * queries.element_size()
    for units, width in lists_together(plan.counts, bytes_per_block, rules.FUSED_BYTES):
        index, unit = plan.blocks[units, :width].flatten(), plan.order[units]
        held = room(2 * len(index) * keys.shape[1], keys).view(2, len(index), -1)
        key, value = (
            torch.index_select(table, 0, index, out=into).view(len(unit), 1, -1, dim)
            for table, into in zip((keys, values), held, strict=True)
        )
        mask = _mask(plan, units, width, scratch)
        some, sums = fused(queries[unit].unsqueeze(1), key, value, mask, plan.scale)
        out.index_copy_(0, unit, some.squeeze(1))
        lse.index_copy_(0, unit, sums.squeeze(1))
    return out, lse


def _mask(plan: ListedUnits, units: slice, width: int, scratch: Scratch) -> Tensor | None:
    """`(units, 1, rows, keys)`: -inf where a pair may not be seen, else 0; None where all may."""
    early, hidden = plan.too_early(units, width), plan.hidden(units)
    if early is None and hidden is None:
        return None
    number, size = units.stop - units.start, plan.layout.block_size
    blocks = scratch.take("blocks", scratch.dtype, number, plan.rows, width, 1).zero_()
    if early is not None:
        rows, first = early
        blocks[:, :, first:].masked_fill_(rows.unsqueeze(-1), -torch.inf)
    mask = scratch.take("mask", scratch.dtype, number, plan.rows, width, size)
    mask.copy_(blocks.expand(mask.shape))
    if hidden is not None:
        mask[:, :, : hidden.shape[2]].masked_fill_(hidden, -torch.inf)
    return mask.view(number, 1, plan.rows, width * size)
