"""Block-sparse attention by torch's FlexAttention: a peer of this package's kernels, and a second opinion.

The same lists as a `BlockMask`, causality and padding as a `mask_mod`, the block bias as a `score_mod` that reads a
captured table.

On CUDA it is compiled, with the tile sizes that torch's autotuning finds best. On the CPU there is nothing worth
compiling: torch's public function refuses gradients there, the operator beneath it has them, as dense arithmetic that
reads nothing but the `mask_mod` (which there reads the lists, too). So on the CPU it checks results and saves nothing.

Source: Dong et al. 2024 (Flex Attention, arXiv 2412.05496).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.backends.reference import reference_attention
from astbench_kernels.layout import BlockLayout, last_key

SMALLEST_TILE = 16
"""Rows and keys of the smallest tile of a matrix instruction, in the forward pass; and the smallest head size."""

SMALLEST_BACKWARD_TILE = 32
"""The same in the backward pass: torch tries tiles of 32 and 64 there, whatever its options name."""

TUNED_TILE = 64
"""From this size on torch's own candidates divide a block; below it a tile is as large as divides the block."""

COMPILED_SHAPES = 64
"""Kinds of call that one process may compile. torch's own 8 are less than a sweep over block sizes and dtypes."""

HOPPER = (9, 0)
"""Compute capability from which on there is a Tensor Memory Accelerator."""


def device_refusals(device: str) -> list[str]:
    """Every reason why FlexAttention cannot run on this type of device."""
    return [] if device in ("cpu", "cuda") else ["it needs a CPU or a CUDA device"]


def call_refusals(
    device: str, dtype: torch.dtype, *, query_group: int | None, block_size: int | None, gradients: bool
) -> list[str]:
    """Every reason why FlexAttention cannot serve a call; None leaves open what depends on it.

    On the CPU it serves everything. On CUDA tiles must divide `query_group` x `block_size`.
    """
    reasons: list[str] = []
    if device != "cuda":
        return reasons
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it computes in float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}")
    tile = SMALLEST_BACKWARD_TILE if gradients else SMALLEST_TILE
    whose = "its backward pass" if gradients else "it"
    for name, size in (("query_group", query_group), ("block_size", block_size)):
        if size is not None and size % tile:
            reasons.append(f"{whose} takes multiples of {tile} as {name}, got {size}")
    return reasons


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    block_bias: Tensor | None,
    scale: float,
    causal: bool,
    key_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`.

    Cost: on CUDA O(query rows x listed keys) time, and memory for a table of all blocks (groups x key blocks) per
    list head, twice with a bias; on the CPU O(N x M) time and memory.
    """
    if q.numel() == 0 or k.numel() == 0:  # its index arithmetic does not take them, and there is nothing to compute
        return reference_attention(
            q, k, v, layout, block_bias=block_bias, scale=scale, causal=causal, key_valid=key_valid
        )
    if key_valid is not None:
        # Padding may hold NaN; a zero weight would keep it.
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0.0) for x in (k, v))
    # Its blocks of queries start at row 0, ours at multiples of query_group.
    lead = layout.query_offset % layout.query_group
    q = pad(q, (0, 0, lead, 0))
    on_cuda = q.device.type == "cuda"
    mask = block_mask(q, layout, causal=causal, key_valid=key_valid, lists_in_mask=not on_cuda)
    table = None if block_bias is None else _bias_table(block_bias, layout)
    add_bias = _add_bias(q, layout)
    if on_cuda:
        options = kernel_options(layout, torch.cuda.get_device_capability(q.device))
        out, lse = _run_compiled(q, k, v, table, add_bias, mask, scale, options)
    else:
        out, lse = _run_dense(q, k, v, table, add_bias, mask, scale)
    return out[:, :, lead:], lse[:, :, lead:]


def block_mask(
    q: Tensor, layout: BlockLayout, *, causal: bool, key_valid: Tensor | None, lists_in_mask: bool = False
) -> Any:
    """The lists as a `BlockMask`: blocks that need no mask apart from those that do, hidden ones left out.

    Args:
        q: Queries from the first row of the first group on.
        layout: The lists.
        causal: Whether under a causal mask.
        key_valid: Padding, as for :func:`astbench_kernels.block_sparse_attention`.
        lists_in_mask: The `mask_mod` hides blocks that are not listed, too: for who reads nothing else.
    """
    from torch.nn.attention.flex_attention import BlockMask

    keep = _per_head(layout.to_mask(), q.shape[1])
    first = layout.first_group * layout.query_group
    # int32 (query rows,): the last key that causality lets each row see
    position = torch.arange(first, first + q.shape[2], dtype=torch.int32, device=q.device)
    last = last_key(position, layout.key_stride) if causal else None
    seen, whole = _visible(layout, last, key_valid, q.device)
    first_rows = None
    if layout.since is not None:
        first_rows = _per_head(layout.first_rows(), q.shape[1])
        whole = whole & (first_rows == 0)
    partial_counts, partial = _ordered(keep & seen & ~whole)
    full_counts, full = _ordered(keep & whole)
    mask_mod = _mask_mod(
        layout, q.shape[1] // keep.shape[1], last, key_valid, keep if lists_in_mask else None, first_rows
    )
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial,
        full_counts,
        full,
        BLOCK_SIZE=(layout.query_group, layout.block_size),
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], layout.key_length),
    )


def _per_head(table: Tensor, heads: int) -> Tensor:
    """One list for all, or one for each: torch finds a head's list by the remainder, not by the quotient."""
    return table if table.shape[1] in (1, heads) else table.repeat_interleave(heads // table.shape[1], 1)


def _visible(
    layout: BlockLayout, last: Tensor | None, key_valid: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bool, broadcastable to `(batch, 1, groups, blocks)`: where a pair may be seen, and where all pairs may."""
    size, blocks = layout.block_size, layout.num_blocks
    start = torch.arange(blocks, device=device) * size
    valid = torch.ones(1, layout.key_length, dtype=torch.bool, device=device) if key_valid is None else key_valid
    valid = pad(valid, (0, blocks * size - layout.key_length)).view(-1, 1, 1, blocks, size)
    seen, whole = valid.any(-1), valid.all(-1)
    if last is not None:
        groups = torch.arange(layout.num_groups, device=device) * layout.query_group
        lowest, highest = last[groups], last[(groups + layout.query_group - 1).clamp(max=len(last) - 1)]
        seen = seen & (start <= highest[:, None])
        whole = whole & (start + size - 1 <= lowest[:, None])
    return seen, whole


def _ordered(keep: Tensor) -> tuple[Tensor, Tensor]:
    """int32 counts, and int32 lists of all block numbers, the kept ones first; its transposing needs all of them."""
    order = torch.argsort(keep.to(torch.uint8), dim=-1, descending=True, stable=True)
    return keep.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(
    layout: BlockLayout,
    share: int,
    last: Tensor | None,
    key_valid: Tensor | None,
    keep: Tensor | None,
    first_rows: Tensor | None,
) -> Callable[..., Tensor]:
    """Which pairs may be seen; `share` query heads have a list of `keep` and `first_rows` together."""
    group, size = layout.query_group, layout.block_size

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key >= 0
        if last is not None:
            allowed = allowed & (key <= last[query])
        if key_valid is not None:
            allowed = allowed & key_valid[batch, key]
        if keep is not None:
            allowed = allowed & keep[batch, head // share, query // group, key // size]
        if first_rows is not None:
            allowed = allowed & (first_rows[batch, head // share, query // group, key // size] <= query % group)
        return allowed

    return visible


def _bias_table(block_bias: Tensor, layout: BlockLayout) -> Tensor:
    """`(batch, list_heads, groups, key_blocks)`, float32 at least: the bias of every block, 0 of those not listed."""
    bias = block_bias.to(torch.promote_types(block_bias.dtype, torch.float32))
    table = bias.new_zeros(*bias.shape[:3], layout.num_blocks + 1)
    index = torch.where(layout.slots, layout.indices, layout.num_blocks).long()
    return table.scatter(-1, index, bias)[..., :-1].contiguous()


def _add_bias(q: Tensor, layout: BlockLayout) -> Callable[..., Tensor]:
    group, size = layout.query_group, layout.block_size
    share = q.shape[1] // layout.indices.shape[1]  # query heads a list

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, table: Tensor) -> Tensor:
        return score + table[batch, head // share, query // group, key // size]

    return add


def _run_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    add_bias: Callable[..., Tensor],
    mask: Any,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator itself: without a compiler in between, captured tensors that need gradients are arguments."""
    operator = torch.ops.higher_order.flex_attention
    captured = () if table is None else (table,)
    score_mod = _unchanged if table is None else add_bias
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]  # it rounds weights to their dtype
    out, lse, *_ = operator(*wide, score_mod, mask.as_tuple(), scale, {}, captured)
    return out.to(q.dtype), lse * math.log(2)  # it counts in powers of two


def _unchanged(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def _run_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    add_bias: Callable[..., Tensor],
    mask: Any,
    scale: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import AuxRequest

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return add_bias(score, batch, head, query, key, table)

    value_dim = v.shape[-1]
    q, k, v = (pad(x, (0, max(0, SMALLEST_TILE - x.shape[-1]))) for x in (q, k, v))
    with config.patch(recompile_limit=COMPILED_SHAPES):
        out, aux = _compiled()(
            q,
            k,
            v,
            score_mod=None if table is None else score_mod,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
    return out[..., :value_dim], aux.lse


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled once; torch compiles again for other kinds of call, the second time for any length.

    `fullgraph`: beyond COMPILED_SHAPES kinds it raises, instead of running the unfused operator in silence.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, mode="max-autotune-no-cudagraphs")


def kernel_options(layout: BlockLayout, capability: tuple[int, int]) -> dict[str, Any]:
    """What FlexAttention is told, the rest being left to its autotuning.

    Args:
        layout: The lists, whose blocks its tiles must divide.
        capability: Compute capability of the device.
    """
    # Its decoding kernel has one list for all heads that share keys.
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    for name, size in (("fwd_BLOCK_M", layout.query_group), ("fwd_BLOCK_N", layout.block_size)):
        if size % TUNED_TILE:
            options[name] = size & -size  # the largest power of two that divides it
    if capability >= HOPPER:
        options["fwd_USE_TMA"] = True
    return options
