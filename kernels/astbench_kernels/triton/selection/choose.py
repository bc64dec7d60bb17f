"""From a predictor's two factors to lists of blocks: scores are made, compared and forgotten within one program.

One program is a tile of query groups of the heads that share keys. Each of their scores becomes an integer of the same
order, above all of them where a block is always kept and below all where it is hidden, so that what is kept are the
largest `kept` of a row. The smallest of those is found exactly, bit by bit; ties with it go to the lower block number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from astbench_kernels.layout import BlockLayout, ceil_div
from astbench_kernels.triton.launch import launch
from astbench_kernels.triton.plan import Tile, next_power_of_two
from astbench_kernels.triton.selection.rule import BlockRule
from astbench_kernels.triton.tiles import matmul

MAX_BLOCKS = 1024
"""Key blocks whose scores a program holds in registers; with more, they pass through SCRATCH_BYTES."""

SCRATCH_BYTES = 64 * 2**20
"""Scores of more than MAX_BLOCKS blocks held at a time, whatever the number of queries."""

_SCORES = 2**13
"""Of a tile, or 16 rows of them if those are more: 32 registers of each thread, and as many for a product's parts."""

_STEP = 16
"""Of the factors' length at a time: a step of all blocks lies in shared memory."""

_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


def choose_blocks(
    rows: Tensor,
    blocks: Tensor,
    rule: BlockRule,
    budget: Callable[[Tensor], Tensor],
    *,
    seen: Tensor | None = None,
) -> BlockLayout:
    """Keep the blocks that `rule` forces and fill each list up to its budget with the best-scoring candidates.

    The score of block j for group i is `rows[i] . blocks[j]`, in float32. The choice is that of
    :func:`astbench_kernels.select_blocks`: ties go to the lower block number.

    Args:
        rows: Query side, float32 `(batch, heads, groups, dim)`.
        blocks: Key side, float32 `(batch, kv_heads, blocks, dim)`; `kv_heads` divides `heads`.
        rule: Which blocks a group may, must and need not see.
        budget: From int64 numbers of visible blocks to the blocks that such a list keeps in all. Called for every
            number there can be, on the CPU too: the width of the lists is the largest budget, or the most
            always kept if those are more, and so follows from shapes alone.
        seen: Bool `(batch, blocks)`: False for blocks that hold nothing but padding.

    Returns:
        A list per head, blocks in ascending order. Lists are as wide as the longest can be, not as it is.

    Raises:
        ValueError: shapes that do not fit together.

    Cost: O(groups x blocks x dim) time. Memory for the lists alone; above MAX_BLOCKS blocks, SCRATCH_BYTES more (and
        never less than what one program needs, 64 bytes a block).
    """
    check_factors(rows, blocks, rule, seen)
    batch, heads, groups, _ = rows.shape
    kv_heads, num_blocks = blocks.shape[1:3]
    widest = int(budget(torch.arange(rule.most_visible + 1, device="cpu")).max())
    width = max(1, rule.most_always_kept, min(widest, rule.most_visible))
    device = rows.device
    # Zeros behind the end of a list: whatever reads them reads a block that exists.
    indices = torch.zeros(batch, heads, groups, width, dtype=torch.int32, device=device)
    counts = torch.zeros(batch, heads, groups, dtype=torch.int32, device=device)
    if rows.numel() and num_blocks:
        per_head = heads // kv_heads * groups
        tile = choose_tile(per_head, num_blocks)
        tiles = ceil_div(per_head, tile.rows)
        arguments = {
            "rows": rows.detach().contiguous(),
            "blocks": blocks.detach().contiguous(),
            "seen": counts if seen is None else seen.contiguous(),
            "budgets": budget(torch.arange(num_blocks + 1, device=device)).to(torch.int32),
            "indices": indices,
            "counts": counts,
            "num_rows": per_head,
            "groups": groups,
            "num_blocks": num_blocks,
            "num_tiles": tiles,
            "width": width,
            "query_offset": rule.query_offset,
            "query_length": rule.query_length,
        }
        with torch.cuda.device_of(rows):
            _launch(arguments, rule, tile, has_seen=seen is not None)
    return BlockLayout(
        indices,
        counts,
        rule.block_size,
        rule.query_group,
        rule.query_length,
        rule.key_length,
        rule.query_offset,
    )


def choose_tile(rows: int, num_blocks: int) -> Tile:
    """Rows, and the blocks that are scored at a time; all of them up to MAX_BLOCKS.

    Chosen so that nothing spills (`astbench_kernels.triton.report`); not measured yet.
    """
    if num_blocks > MAX_BLOCKS:
        return Tile(rows=16, keys=128, num_warps=8, num_stages=1)
    keys = max(16, next_power_of_two(num_blocks))
    tall = max(16, min(64, _SCORES // keys, next_power_of_two(rows)))
    return Tile(tall, keys, 8 if tall * keys >= 2**12 else 4, 1)


def check_factors(rows: Tensor, blocks: Tensor, rule: BlockRule, seen: Tensor | None) -> None:
    """Refuse what does not fit together, with everything that does not.

    Raises:
        ValueError: with all of it.
    """
    problems = []
    if rows.dtype != torch.float32 or blocks.dtype != torch.float32:
        problems.append(f"rows and blocks must be float32, got {rows.dtype} and {blocks.dtype}")
    if rows.dim() != 4 or blocks.dim() != 4:
        problems.append("rows must be (batch, heads, groups, dim) and blocks (batch, kv_heads, blocks, dim)")
    elif rows.shape[0] != blocks.shape[0] or rows.shape[1] % blocks.shape[1] or rows.shape[3] != blocks.shape[3]:
        problems.append(f"rows {tuple(rows.shape)} do not fit blocks {tuple(blocks.shape)}: kv heads must divide heads")
    elif (rows.shape[2], blocks.shape[2]) != (rule.num_groups, rule.num_blocks):
        problems.append(
            f"the rule is for {rule.num_groups} groups and {rule.num_blocks} blocks, "
            f"got {rows.shape[2]} and {blocks.shape[2]}"
        )
    elif seen is not None and seen.shape != (blocks.shape[0], blocks.shape[2]):
        problems.append(f"seen must be {(blocks.shape[0], blocks.shape[2])}, got {tuple(seen.shape)}")
    if problems:
        raise ValueError("; ".join(problems))


def _launch(arguments: dict[str, Any], rule: BlockRule, tile: Tile, *, has_seen: bool) -> None:
    batch, kv_heads, num_blocks, dim = arguments["blocks"].shape
    tiles = batch * kv_heads * arguments["num_tiles"]
    constants = {
        "CAUSAL": rule.causal,
        "OWN": rule.local_blocks is not None,
        "REACH": min((rule.local_blocks or 0) * rule.block_size, 2**30),  # with a position, still 32 bits
        "FIRST": rule.sink_block,
        "HAS_SEEN": has_seen,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "STEP": _STEP,
        "BLOCK_SIZE": rule.block_size,
        "GROUP": rule.query_group,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
    }
    if num_blocks <= MAX_BLOCKS:
        launch(choose_in_registers, tiles, arguments, constants, tile)
        return
    programs = min(tiles, max(1, SCRATCH_BYTES // (4 * tile.rows * num_blocks)))
    scratch = torch.empty(programs, tile.rows, num_blocks, dtype=torch.int32, device=arguments["rows"].device)
    more = {"scratch": scratch, "all_tiles": tiles, "programs": programs}
    launch(choose_through_scratch, programs, arguments | more, constants, tile)


_SIZES = ["num_rows", "groups", "num_blocks", "num_tiles", "width", "query_offset", "query_length"]


@triton.jit
def rank_scores(
    scores, block, first, last, exists, seen, num_blocks,
    CAUSAL: tl.constexpr, OWN: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, HAS_SEEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """int32 (rows, blocks) in the order of the scores: _HIGHEST where it is always kept, _LOWEST where it is hidden.

    `first` and `last` are the positions of each row's group. A block that a row sees either competes or is always
    kept, so the rest tell how many it sees.
    """
    there = block < num_blocks
    begin = block * BLOCK_SIZE
    if HAS_SEEN:
        there = there & (tl.load(seen + block, mask=there, other=0) != 0)
    visible = there[None, :] & exists[:, None]
    candidate = visible
    if CAUSAL:
        visible = visible & (begin[None, :] <= last[:, None])
        candidate = visible & ((begin + BLOCK_SIZE)[None, :] <= first[:, None])
    always_kept = visible & ((block == 0) & FIRST)[None, :]
    if OWN:
        near = (begin[None, :] <= (last + REACH)[:, None]) & ((begin + BLOCK_SIZE)[None, :] > (first - REACH)[:, None])
        always_kept = always_kept | (visible & near)
    # A sum that starts at zero is never -0, whose bits differ. Those of a NaN may be all ones, of either sign.
    bits = scores.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & _HIGHEST)
    order = tl.minimum(tl.maximum(order, _LOWEST + 1), _HIGHEST - 1)
    return tl.where(always_kept, _HIGHEST, tl.where(candidate, order, _LOWEST))


@triton.jit
def _order_of_scores(
    rows, row, exists, blocks, block, seen, groups, num_blocks, query_offset, query_length,
    CAUSAL: tl.constexpr, OWN: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, HAS_SEEN: tl.constexpr,
    DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """:func:`rank_scores` of the factors' products, (rows, keys)."""
    there = block < num_blocks
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    for start in range(0, DIM, STEP):
        column = start + tl.arange(0, STEP)
        left = tl.load(
            rows + row.to(tl.int64)[:, None] * DIM + column[None, :],
            mask=exists[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        right = tl.load(
            blocks + block[None, :] * DIM + column[:, None], mask=there[None, :] & (column < DIM)[:, None], other=0.0
        )
        scores += matmul(left, right, True)
    first = query_offset + (row % groups) * GROUP
    last = tl.minimum(first + GROUP, query_offset + query_length) - 1
    return rank_scores(
        scores, block, first, last, exists, seen, num_blocks, CAUSAL, OWN, REACH, FIRST, HAS_SEEN, BLOCK_SIZE
    )


@triton.jit
def _kept_of_row(budgets, visible, always_kept):
    """How many blocks each row keeps: its budget, but all that are always kept, and no more than it sees."""
    return tl.minimum(tl.maximum(tl.load(budgets + visible), always_kept), visible)


@triton.jit
def _store_kept(indices, order, threshold, above_before, ties_before, spare, block, exists, row, width):
    """Lists what is above the threshold and the first `spare` ties with it; returns the counts of both, with before.

    One scan counts both: the lower half what is above, the upper half ties.
    """
    above, tie = order > threshold[:, None], order == threshold[:, None]
    running = tl.cumsum(above.to(tl.int32) + (tie.to(tl.int32) << 16), 1)
    ties = ties_before[:, None] + (running >> 16)
    place = above_before[:, None] + (running & 0xFFFF) + tl.minimum(ties, spare[:, None]) - 1
    kept = above | (tie & (ties <= spare[:, None]))
    target = indices + row.to(tl.int64)[:, None] * width + place
    tl.store(target, block[None, :] + tl.zeros_like(place), mask=kept & exists[:, None])
    return above_before + tl.sum(above.to(tl.int32), 1), ties_before + tl.sum(tie.to(tl.int32), 1)


@triton.jit(do_not_specialize=_SIZES)
def choose_in_registers(
    rows, blocks, seen, budgets, indices, counts,
    num_rows, groups, num_blocks, num_tiles, width, query_offset, query_length,
    CAUSAL: tl.constexpr, OWN: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, HAS_SEEN: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """All blocks at once. Writes `indices` `(batch, heads, groups, width)` and `counts`."""
    pair = (tl.program_id(0) // num_tiles).to(tl.int64)
    row = (tl.program_id(0) % num_tiles) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    block = tl.arange(0, KEYS)
    order = _order_of_scores(
        rows + pair * num_rows * DIM, row, exists, blocks + pair * num_blocks * DIM, block,
        seen + pair // KV_HEADS * num_blocks, groups, num_blocks, query_offset, query_length,
        CAUSAL, OWN, REACH, FIRST, HAS_SEEN, DIM, STEP, BLOCK_SIZE, GROUP, ROWS, KEYS,
    )  # fmt: skip
    visible, always_kept = tl.sum((order > _LOWEST).to(tl.int32), 1), tl.sum((order == _HIGHEST).to(tl.int32), 1)
    kept = _kept_of_row(budgets, visible, always_kept)
    # The largest number that `kept` of a row reach: its sign, then its bits from the highest down.
    threshold = tl.where(tl.sum((order >= 0).to(tl.int32), 1) >= kept, 0, _LOWEST)
    for step in range(31):
        higher = threshold | (1 << (30 - step))
        reached = tl.sum((order >= higher[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= kept, higher, threshold)
    none = tl.zeros([ROWS], tl.int32)
    spare = kept - tl.sum((order > threshold[:, None]).to(tl.int32), 1)
    _store_kept(indices + pair * num_rows * width, order, threshold, none, none, spare, block, exists, row, width)
    tl.store(counts + pair * num_rows + row, kept, mask=exists)


@triton.jit
def _load_order(scratch, lane, start, num_blocks, KEYS: tl.constexpr):
    block = start + tl.arange(0, KEYS)
    return tl.load(
        scratch + lane[:, None] * num_blocks + block[None, :], mask=(block < num_blocks)[None, :], other=_LOWEST
    )


@triton.jit(do_not_specialize=[*_SIZES, "all_tiles", "programs"])
def choose_through_scratch(
    rows, blocks, seen, budgets, indices, counts, scratch,
    num_rows, groups, num_blocks, num_tiles, all_tiles, programs, width, query_offset, query_length,
    CAUSAL: tl.constexpr, OWN: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, HAS_SEEN: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """KEYS blocks at a time; `scratch` `(programs, ROWS, num_blocks)` holds what is to be read again.

    Each program takes one tile after another, so that the scratch does not grow with them.
    """
    lane = tl.arange(0, ROWS)
    none = tl.zeros([ROWS], tl.int32)
    scratch += tl.program_id(0).to(tl.int64) * ROWS * num_blocks
    for tile in range(tl.program_id(0), all_tiles, programs):
        pair = (tile // num_tiles).to(tl.int64)
        row = (tile % num_tiles) * ROWS + lane
        exists = row < num_rows
        visible, always_kept, positive = none, none, none
        for start in range(0, num_blocks, KEYS):
            block = start + tl.arange(0, KEYS)
            order = _order_of_scores(
                rows + pair * num_rows * DIM, row, exists, blocks + pair * num_blocks * DIM, block,
                seen + pair // KV_HEADS * num_blocks, groups, num_blocks, query_offset, query_length,
                CAUSAL, OWN, REACH, FIRST, HAS_SEEN, DIM, STEP, BLOCK_SIZE, GROUP, ROWS, KEYS,
            )  # fmt: skip
            place = lane[:, None] * num_blocks + block[None, :]
            tl.store(scratch + place, order, mask=(block < num_blocks)[None, :])
            visible += tl.sum((order > _LOWEST).to(tl.int32), 1)
            always_kept += tl.sum((order == _HIGHEST).to(tl.int32), 1)
            positive += tl.sum((order >= 0).to(tl.int32), 1)
        tl.debug_barrier()  # what a thread reads, another one wrote
        kept = _kept_of_row(budgets, visible, always_kept)
        threshold = tl.where(positive >= kept, 0, _LOWEST)
        for step in range(31):
            higher = threshold | (1 << (30 - step))
            reached = none
            for start in range(0, num_blocks, KEYS):
                order = _load_order(scratch, lane, start, num_blocks, KEYS)
                reached += tl.sum((order >= higher[:, None]).to(tl.int32), 1)
            threshold = tl.where(reached >= kept, higher, threshold)
        above = none
        for start in range(0, num_blocks, KEYS):
            order = _load_order(scratch, lane, start, num_blocks, KEYS)
            above += tl.sum((order > threshold[:, None]).to(tl.int32), 1)
        spare = kept - above
        above, ties = none, none
        for start in range(0, num_blocks, KEYS):
            order = _load_order(scratch, lane, start, num_blocks, KEYS)
            above, ties = _store_kept(
                indices + pair * num_rows * width, order, threshold, above, ties, spare,
                start + tl.arange(0, KEYS), exists, row, width,
            )  # fmt: skip
        tl.store(counts + pair * num_rows + row, kept, mask=exists)
        tl.debug_barrier()  # the next tile writes where slower threads still read
