"""What a block predictor reads of keys and values: means and extremes of each key block, in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astbench_kernels.layout import ceil_div
from astbench_kernels.triton.launch import launch, rows_contiguous
from astbench_kernels.triton.plan import Tile, next_power_of_two, padded_dim
from astbench_kernels.triton.tiles import load_tile

_ELEMENTS = 4096
"""Of a tile of keys: 32 registers of each thread, and as many for the values."""


class PooledBlocks(NamedTuple):
    """Each key block in brief, float32 and zero where a block holds no valid row.

    Attributes:
        mean_key: `(batch, kv_heads, blocks, head_dim)`, over the block's valid rows, as all others.
        max_key: The same shape.
        min_key: The same shape.
        mean_value: `(batch, kv_heads, blocks, value_dim)`.
        counts: int32 `(batch, blocks)`: valid rows.
    """

    mean_key: Tensor
    max_key: Tensor
    min_key: Tensor
    mean_value: Tensor
    counts: Tensor


def pool_blocks(k: Tensor, v: Tensor, key_valid: Tensor | None, block_size: int) -> PooledBlocks:
    """Means and extremes of each key block, without a gradient.

    Args:
        k: `(batch, kv_heads, key_length, head_dim)`, fp16/bf16/fp32.
        v: `(batch, kv_heads, key_length, value_dim)`.
        key_valid: Bool `(batch, key_length)`, False for padding, which may hold anything; None when all is real.
        block_size: Keys per block.

    Cost: reads k and v once; O(blocks) memory.
    """
    batch, heads, length, dim = k.shape
    value_dim, blocks = v.shape[-1], ceil_div(length, block_size)
    k, v = rows_contiguous(k.detach()), rows_contiguous(v.detach())
    shape, device = (batch, heads, blocks), k.device
    pooled = PooledBlocks(
        mean_key=torch.empty(*shape, dim, dtype=torch.float32, device=device),
        max_key=torch.empty(*shape, dim, dtype=torch.float32, device=device),
        min_key=torch.empty(*shape, dim, dtype=torch.float32, device=device),
        mean_value=torch.empty(*shape, value_dim, dtype=torch.float32, device=device),
        counts=torch.empty(batch, blocks, dtype=torch.int32, device=device),
    )
    if not batch * heads * blocks:
        return pooled
    block_dim, block_value = padded_dim(dim), padded_dim(value_dim)
    rows = min(next_power_of_two(block_size), max(1, _ELEMENTS // max(block_dim, block_value)))
    arguments: dict[str, Any] = {"k": k, "v": v, "key_valid": k if key_valid is None else key_valid.contiguous()}
    for name, x in (("k", k), ("v", v)):
        arguments |= dict(zip((f"stride_{name}b", f"stride_{name}h", f"stride_{name}n"), x.stride(), strict=False))
    with torch.cuda.device_of(k):
        launch(
            pool,
            batch * heads * blocks,
            {**arguments, **pooled._asdict(), "num_blocks": blocks, "key_length": length},
            {"HEADS": heads, "HAS_VALID": key_valid is not None, "DIM": dim, "BLOCK_DIM": block_dim}
            | {"VALUE_DIM": value_dim, "BLOCK_VALUE": block_value, "BLOCK_SIZE": block_size, "ROWS": rows},
            Tile(rows=rows, keys=1, num_warps=4, num_stages=1),
        )
    return pooled


@triton.jit(do_not_specialize=["num_blocks", "key_length"])
def pool(
    k, v, key_valid, mean_key, max_key, min_key, mean_value, counts,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, num_blocks, key_length,
    HEADS: tl.constexpr, HAS_VALID: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program is one block of one head, ROWS rows at a time."""
    unit = tl.program_id(0).to(tl.int64)
    block, head, batch = unit % num_blocks, unit // num_blocks % HEADS, unit // num_blocks // HEADS
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    key_valid += batch * key_length
    sum_key = tl.zeros([BLOCK_DIM], tl.float32)
    sum_value = tl.zeros([BLOCK_VALUE], tl.float32)
    high = tl.full([BLOCK_DIM], -float("inf"), tl.float32)
    low = tl.full([BLOCK_DIM], float("inf"), tl.float32)
    count = 0
    for start in range(0, BLOCK_SIZE, ROWS):
        inside = start + tl.arange(0, ROWS)
        key = block * BLOCK_SIZE + inside
        live = (inside < BLOCK_SIZE) & (key < key_length)
        if HAS_VALID:
            live = live & (tl.load(key_valid + key, mask=live, other=0) != 0)
        keys = load_tile(k, key * stride_kn, live, DIM, BLOCK_DIM, True).to(tl.float32)
        values = load_tile(v, key * stride_vn, live, VALUE_DIM, BLOCK_VALUE, True).to(tl.float32)
        sum_key += tl.sum(keys, 0)
        sum_value += tl.sum(values, 0)
        high = tl.maximum(high, tl.max(tl.where(live[:, None], keys, -float("inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(live[:, None], keys, float("inf")), 0))
        count += tl.sum(live.to(tl.int32), 0)
    divisor = tl.maximum(count, 1).to(tl.float32)
    column = tl.arange(0, BLOCK_DIM)
    target = unit * DIM + column
    tl.store(mean_key + target, sum_key / divisor, mask=column < DIM)
    tl.store(max_key + target, tl.where(count > 0, high, 0.0), mask=column < DIM)
    tl.store(min_key + target, tl.where(count > 0, low, 0.0), mask=column < DIM)
    column = tl.arange(0, BLOCK_VALUE)
    tl.store(mean_value + unit * VALUE_DIM + column, sum_value / divisor, mask=column < VALUE_DIM)
    tl.store(counts + batch * num_blocks + block, count, mask=head == 0)  # the same for all heads
