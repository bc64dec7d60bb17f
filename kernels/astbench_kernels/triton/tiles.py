"""Chunks that several kernels share: masked loads, and which rows and keys a tile holds."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(base, offsets, live, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows at `base + offsets` as (rows, BLOCK_DIM), zeros beyond DIM and where a masked row is not live."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + offsets[:, None] + column[None, :]
    if MASKED:
        if DIM == BLOCK_DIM:
            return tl.load(pointers, mask=live[:, None], other=0.0)
        return tl.load(pointers, mask=live[:, None] & (column < DIM)[None, :], other=0.0)
    if DIM == BLOCK_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)


@triton.jit
def load_keys(
    base, first, key, stride, live, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr,
    ADJACENT: tl.constexpr,
):  # fmt: skip
    """Rows `first + key`; where they are ADJACENT only the first address is 64 bits wide, which saves registers."""
    if ADJACENT:
        return load_tile(base + first.to(tl.int64) * stride, key * stride, live, DIM, BLOCK_DIM, MASKED)
    return load_tile(base, key.to(tl.int64) * stride, live, DIM, BLOCK_DIM, MASKED)


@triton.jit
def store_tile(base, offsets, tile, live, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The inverse of a masked `load_tile`, in the dtype of `base`."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + offsets[:, None] + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=live[:, None] & (column < DIM)[None, :])


@triton.jit
def matmul(a, b, PRECISE: tl.constexpr):
    """Product in float32. Plain tf32 would keep three digits of float32 inputs; three passes keep seven."""
    if PRECISE:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a, b)


@triton.jit
def log_of_sum(highest, total):
    """Log-sum-exp in base 2 from the highest logit and the sum relative to it; -inf for rows that saw nothing."""
    return tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))


@triton.jit
def last_key(position, KEY_STRIDE: tl.constexpr):
    """The last key that queries at these positions see under a causal mask, -1 where they see none."""
    if KEY_STRIDE == 1:
        return position
    return (position + 1) // KEY_STRIDE - 1


@triton.jit
def rows_of_group(index, group, first_group, query_offset, query_length, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Row `index` of a head group's group: (head in the head group, position, query row, whether that row exists).

    Head and row are int64, since they are multiplied by strides.
    """
    position = (first_group + group) * GROUP + index // HEADS
    row = position - query_offset
    live = (index < GROUP * HEADS) & (row >= 0) & (row < query_length)
    return (index % HEADS).to(tl.int64), position, row.to(tl.int64), live


@triton.jit
def rows_of_entries(
    start,
    stop,
    entries,
    width,
    first_group,
    query_offset,
    query_length,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows `start .. start + ROWS` of a run of transposed list entries, each of which stands for a whole group.

    Returns:
        The entry's place in its list head's `(groups, width)` table, and what :func:`rows_of_group` returns.
    """
    index = start + tl.arange(0, ROWS)
    if (GROUP * HEADS) % ROWS == 0:  # one entry for the whole tile
        code = tl.load(entries + start // (GROUP * HEADS)) + tl.zeros([ROWS], tl.int32)
        inside = index < stop
    else:
        inside = index < stop
        code = tl.load(entries + index // (GROUP * HEADS), mask=inside, other=0)
    head, position, row, live = rows_of_group(
        index % (GROUP * HEADS), code // width, first_group, query_offset, query_length, GROUP, HEADS
    )
    return code, head, position, row, live & inside
