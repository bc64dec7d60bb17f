"""What both backward passes need of each query row, laid out as their tiles read it."""

from __future__ import annotations

import triton
import triton.language as tl

from astbench_kernels.triton.tiles import LOG2E, load_tile, rows_of_group


@triton.jit(do_not_specialize=["length", "first_group", "query_offset", "query_length"])
def rowsums(
    out, d_out, lse, d_lse, delta, lse2, stride_ob, stride_oh, stride_on,
    length, first_group, query_offset, query_length,
    HEADS: tl.constexpr, HEAD_GROUPS: tl.constexpr, GROUP: tl.constexpr, HAS_LSE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`delta = rowsum(out * d_out) - d_lse`, and the log-sum-exp in base 2; +inf where a row saw nothing: weights of 0.

    Both `(batch, head groups, length)`, `length` all rows of all groups, those of one group next to one another as a
    tile holds them. Rows that a cut group lacks get 0 and +inf. `out`, `lse` and `d_lse` are contiguous.
    """
    each: tl.constexpr = HEADS // HEAD_GROUPS
    per_unit = length // ROWS
    unit = tl.program_id(0) // per_unit  # batch x head groups
    place = tl.program_id(0) % per_unit * ROWS + tl.arange(0, ROWS)
    size: tl.constexpr = GROUP * each
    head, _position, row, exists = rows_of_group(
        place % size, place // size, first_group, query_offset, query_length, GROUP, each
    )
    batch, head = (unit // HEAD_GROUPS).to(tl.int64), (unit % HEAD_GROUPS) * each + head
    source = (batch * HEADS + head) * query_length + row
    known = load_tile(out, source * DIM, exists, DIM, BLOCK_DIM, True).to(tl.float32)
    grad = load_tile(d_out + batch * stride_ob, head * stride_oh + row * stride_on, exists, DIM, BLOCK_DIM, True)
    total = tl.sum(known * grad.to(tl.float32), 1)
    if HAS_LSE:
        total -= tl.load(d_lse + source, mask=exists, other=0.0)
    sums = tl.load(lse + source, mask=exists, other=-float("inf"))
    target = unit.to(tl.int64) * length + place
    tl.store(delta + target, total)
    tl.store(lse2 + target, tl.where(sums == -float("inf"), float("inf"), sums * LOG2E))
