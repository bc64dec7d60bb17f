"""Carried lists without a wait: every row of a tile chooses, and a block is listed from the first row that chose it.

Three launches, a stretch of tiles at a time:

1. :func:`score_rows`: each row's score of each block, as an integer of the same order; several columns a block (an
   index of tokens) become one score here, so that no token's score reaches memory.
2. :func:`find_thresholds`: a row keeps the integers above a threshold, and the first few that equal it.
3. :func:`list_blocks`: one program a tile. The first row that keeps a block, and the list in ascending order.

The integers pass through memory, 4 bytes a row and block: so the second launch is as wide as there are rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from astbench_kernels.layout import BlockLayout, ceil_div
from astbench_kernels.triton.launch import launch
from astbench_kernels.triton.plan import Tile, next_power_of_two
from astbench_kernels.triton.selection.choose import _HIGHEST, _LOWEST, _kept_of_row, check_factors, rank_scores
from astbench_kernels.triton.selection.rule import BlockRule
from astbench_kernels.triton.tiles import matmul

MOST_BLOCKS = 4096
"""Key blocks of a row that one program holds in registers. More are not served."""

MOST_COLUMNS = 128
"""Columns a block, as many as a program multiplies at a time. More are not served."""

STRETCH_BYTES = 256 * 2**20
"""Scores that are held at a time, unless one tile has more."""

_HELD = 1024
"""Scores of a program with one warp, 32 of a thread: rows that are shorter share one."""

_LISTED = 32
"""Blocks that a tile's program lists at a time: so nothing spills."""

_STEP = 16
_COLUMNS = tl.constexpr(64)


def carried_refusals(rule: BlockRule, tile: int, columns: int, pool: int) -> list[str]:
    """Every reason why :func:`choose_carried` cannot serve a choice.

    Args:
        rule: Positions.
        tile: Rows that share a list.
        columns: Of a block.
        pool: Consecutive columns of which the largest counts.
    """
    reasons = []
    if not rule.causal or rule.query_group != 1:
        reasons.append("carried lists are causal, and every row chooses")
    if rule.query_offset % tile:
        reasons.append(f"row {rule.query_offset} stands inside a tile of {tile}, whose list began before this call")
    if rule.num_blocks > MOST_BLOCKS:
        reasons.append(f"{rule.num_blocks:,} blocks are more than {MOST_BLOCKS:,}, which a program holds")
    if columns > MOST_COLUMNS or columns != next_power_of_two(columns) or pool != next_power_of_two(pool):
        reasons.append(f"{columns} columns a block and a pool of {pool} must be powers of two, at most {MOST_COLUMNS}")
    return reasons


def choose_carried(
    rows: Tensor,
    columns: Tensor,
    rule: BlockRule,
    tile: int,
    budget: Callable[[Tensor], Tensor],
    *,
    pool: int = 1,
    share: Tensor | float | None = None,
    seen: Tensor | None = None,
    real: Tensor | None = None,
) -> BlockLayout:
    """What each row keeps, as carried lists: see :meth:`BlockLayout.carried`.

    The score of block j for row i is the log of the summed exponentials of `rows[i] . columns[c]` over the block's
    columns c, of which consecutive `pool` count by their largest; of a single column the product itself.

    Args:
        rows: Query side, float32 `(batch, heads, query_length, dim)`.
        columns: Key side, float32 `(batch, kv_heads, blocks x columns a block, dim)`; `kv_heads` divides `heads`.
        rule: Which blocks a row may, must and need not see; causal, a group a row.
        tile: Rows that share and carry a list; a divisor of the rule's `query_offset`.
        budget: From int64 numbers of visible blocks to the blocks that such a row keeps in all.
        pool: A divisor of the columns a block.
        share: A row keeps the free blocks that hold at least this share of its free blocks' mass, and no fewer than
            its budget. None: as many as its budget says.
        seen: Bool `(batch, blocks)`: False for blocks that hold nothing but padding.
        real: Bool `(batch, query_length)`: False for rows of padding, which choose nothing.

    Returns:
        A list a head and tile, with `since`. Lists are as wide as they could be: nothing waits for the device.

    Raises:
        ValueError: what :func:`carried_refusals` says, or shapes that do not fit together.

    Cost: O(query_length x blocks x columns a block x dim) time; lists of 8 bytes, and STRETCH_BYTES.
    """
    blocks = rule.num_blocks
    parts = max(1, columns.shape[2] // max(1, blocks))
    if reasons := carried_refusals(rule, tile, parts, pool):
        raise ValueError("; ".join(reasons))
    check_factors(rows, columns[:, :, ::parts], rule, seen)
    batch, heads, length, dim = rows.shape
    device, tiles = rows.device, ceil_div(length, tile)
    widest = int(budget(torch.arange(rule.most_visible + 1, device="cpu")).max())
    most = rule.most_visible if share is not None else min(rule.most_visible, tile * max(widest, rule.most_always_kept))
    indices = torch.zeros(batch, heads, tiles, max(1, most), dtype=torch.int32, device=device)
    since = torch.zeros_like(indices)
    counts = torch.zeros(batch, heads, tiles, dtype=torch.int32, device=device)
    if rows.numel() and blocks:
        every = {
            "rows": rows.detach().contiguous(),
            "columns": columns.detach().contiguous(),
            "seen": counts if seen is None else seen.contiguous(),
            "real": counts if real is None else real.expand(batch, -1).contiguous(),
            "budgets": budget(torch.arange(blocks + 1, device=device)).to(torch.int32),
            "log_share": _log_share(share, device),
            "indices": indices,
            "since": since,
            "counts": counts,
            "tiles": tiles,
            "num_blocks": blocks,
            "width": indices.shape[-1],
            "query_offset": rule.query_offset,
            "query_length": length,
        }
        constants = {
            "FIRST": rule.sink_block,
            "REACH": min((rule.local_blocks or 0) * rule.block_size, 2**30),
            "HAS_SEEN": seen is not None,
            "HAS_REAL": real is not None,
            "BY_SHARE": share is not None,
            "HEADS": heads,
            "KV_HEADS": columns.shape[1],
            "DIM": dim,
            "PARTS": parts,
            "POOL": pool,
            "BLOCK_SIZE": rule.block_size,
            "TILE": tile,
        }
        with torch.cuda.device_of(rows):
            _in_stretches(every, constants, batch * heads * tiles)
    return BlockLayout(indices, counts, rule.block_size, tile, length, rule.key_length, rule.query_offset, since=since)


def _log_share(share: Tensor | float | None, device: torch.device) -> Tensor:
    """float32 `(1,)`; a calibrated share stays where it is."""
    if isinstance(share, Tensor):
        return share.detach().float().log().reshape(1)
    return torch.full((1,), 0.0 if share is None else math.log(share), device=device)


def _in_stretches(every: dict[str, Any], constants: dict[str, Any], all_tiles: int) -> None:
    """All tiles of all heads, as many at a time as STRETCH_BYTES hold."""
    tile, blocks = constants["TILE"], every["num_blocks"]
    lanes = max(16, next_power_of_two(tile))
    wide = max(1, _COLUMNS.value // constants["PARTS"])
    at_once = max(1, min(all_tiles, STRETCH_BYTES // (4 * tile * blocks)))
    device = every["rows"].device
    held = {
        "order": torch.empty(at_once, tile, blocks, dtype=torch.int32, device=device),
        "threshold": torch.empty(at_once, tile, dtype=torch.int32, device=device),
        "spare": torch.empty(at_once, tile, dtype=torch.int32, device=device),
    }
    for first in range(0, all_tiles, at_once):
        here = min(at_once, all_tiles - first)
        given = every | held | {"first_tile": first, "stop_tile": first + here}
        constants = constants | {"LANES": lanes}
        chunks, warps = ceil_div(blocks, wide), 4 if lanes * wide * constants["PARTS"] <= 64 * 64 else 8
        _run(score_rows, here * chunks, given, constants | {"WIDE": wide, "STEP": _STEP}, Tile(lanes, wide, warps, 2))
        keys = max(16, next_power_of_two(blocks))
        some = min(16, max(1, _HELD // keys))
        sizes, warps = {"ROWS": some, "KEYS": keys}, 1 if keys <= _HELD else 4
        _run(find_thresholds, ceil_div(here * tile, some), given, constants | sizes, Tile(some, keys, warps, 1))
        _run(list_blocks, here, given, constants | {"KEYS": _LISTED}, Tile(lanes, _LISTED, 8, 1))


def _run(kernel: Any, programs: int, given: dict[str, Any], constants: dict[str, Any], tile: Tile) -> None:
    """A launch with what the kernel takes of all that there is."""
    names = set(kernel.arg_names)
    take = {name: value for name, value in given.items() if name in names}
    launch(kernel, programs, take, {name: value for name, value in constants.items() if name in names}, tile)


_SIZES = ["first_tile", "stop_tile", "tiles", "num_blocks", "width", "query_offset", "query_length"]


@triton.jit(do_not_specialize=_SIZES)
def score_rows(
    rows, columns, seen, order,
    first_tile, tiles, num_blocks, query_offset, query_length,
    FIRST: tl.constexpr, REACH: tl.constexpr, HAS_SEEN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, POOL: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`order` `(tiles at a time, TILE, num_blocks)`: WIDE blocks of the rows of one tile.

    Blocks behind the tile are left as they are: nobody looks at them.
    """
    chunks = tl.cdiv(num_blocks, WIDE)
    here, begin = tl.program_id(0) // chunks, (tl.program_id(0) % chunks) * WIDE
    pair, lane = ((first_tile + here) // tiles).to(tl.int64), tl.arange(0, LANES)
    row = ((first_tile + here) % tiles) * TILE + lane
    exists = (lane < TILE) & (row < query_length)
    block = begin + tl.arange(0, WIDE)
    last_row = query_offset + tl.minimum(((first_tile + here) % tiles + 1) * TILE, query_length) - 1
    if begin * BLOCK_SIZE <= last_row:
        batch, head = pair // HEADS, pair % HEADS
        columns += (batch * KV_HEADS + head // (HEADS // KV_HEADS)) * num_blocks * PARTS * DIM
        rows += pair * query_length * DIM
        column = begin * PARTS + tl.arange(0, WIDE * PARTS)
        there = column < num_blocks * PARTS
        products = tl.zeros([LANES, WIDE * PARTS], tl.float32)
        for start in range(0, DIM, STEP):
            part = start + tl.arange(0, STEP)
            left = tl.load(
                rows + row.to(tl.int64)[:, None] * DIM + part[None, :],
                mask=exists[:, None] & (part < DIM)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                columns + column.to(tl.int64)[None, :] * DIM + part[:, None],
                mask=there[None, :] & (part < DIM)[:, None], other=0.0,
            )  # fmt: skip
            products += matmul(left, right, True)
        if PARTS == 1:
            scores = products
        elif PARTS == POOL:
            scores = tl.max(tl.reshape(products, [LANES, WIDE, POOL]), 2)
        else:
            largest = tl.max(tl.reshape(products, [LANES, WIDE, PARTS // POOL, POOL]), 3)
            highest = tl.max(largest, 2)
            scores = highest + tl.log(tl.sum(tl.exp(largest - highest[:, :, None]), 2))
        position = query_offset + row
        found = rank_scores(
            scores, block, position, position, exists, seen + batch * num_blocks, num_blocks,
            True, True, REACH, FIRST, HAS_SEEN, BLOCK_SIZE,
        )  # fmt: skip
        target = order + (here.to(tl.int64) * TILE + lane)[:, None] * num_blocks + block[None, :]
        tl.store(target, found, mask=(lane < TILE)[:, None] & (block < num_blocks)[None, :])


@triton.jit
def _score_of(order):
    """The float32 score that :func:`rank_scores` made this integer of."""
    return (order ^ ((order >> 31) & _HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_SIZES)
def find_thresholds(
    order, real, budgets, log_share, threshold, spare,
    first_tile, stop_tile, tiles, num_blocks, query_offset, query_length,
    HAS_REAL: tl.constexpr, BY_SHARE: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`threshold` and `spare` of ROWS rows: each keeps what is above, and the first `spare` that are equal."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    number = first_tile + place // TILE
    inside = number < stop_tile
    pair, row = number // tiles, (number % tiles) * TILE + place % TILE
    block = tl.arange(0, KEYS)
    # What starts behind the row was perhaps never written.
    written = (block < num_blocks)[None, :] & ((block * BLOCK_SIZE)[None, :] <= (query_offset + row)[:, None])
    ranked = tl.load(
        order + place[:, None] * num_blocks + block[None, :], mask=written & inside[:, None], other=_LOWEST
    )
    visible, always_kept = tl.sum((ranked > _LOWEST).to(tl.int32), 1), tl.sum((ranked == _HIGHEST).to(tl.int32), 1)
    kept = _kept_of_row(budgets, visible, always_kept)
    # The largest number that `kept` reach: its sign, then its bits from the highest down.
    least = tl.where(tl.sum((ranked >= 0).to(tl.int32), 1) >= kept, 0, _LOWEST)
    for step in range(31):
        higher = least | (1 << (30 - step))
        reached = tl.sum((ranked >= higher[:, None]).to(tl.int32), 1)
        least = tl.where(reached >= kept, higher, least)
    room = kept - tl.sum((ranked > least[:, None]).to(tl.int32), 1)
    if BY_SHARE:
        free = (ranked > _LOWEST) & (ranked < _HIGHEST)
        highest = tl.max(tl.where(free, _score_of(ranked), -1e38), 1)
        total = tl.sum(tl.where(free, tl.exp(_score_of(ranked) - highest[:, None]), 0.0), 1)
        enough = highest + tl.log(tl.where(total > 0, total, 1.0)) + tl.load(log_share)
        # One less than the least score that is enough; never -0, whose bits differ.
        bits = (enough + 0.0).to(tl.int32, bitcast=True)
        too_little = (bits ^ ((bits >> 31) & _HIGHEST)) - 1
        more = (total > 0) & (too_little < least)
        least, room = tl.where(more, too_little, least), tl.where(more, 0, room)
    exists = inside & (row < query_length)
    if HAS_REAL:
        exists = exists & (tl.load(real + pair // HEADS * query_length + row, mask=exists, other=0) != 0)
    tl.store(threshold + place, tl.where(exists, least, _HIGHEST), mask=inside)
    tl.store(spare + place, tl.where(exists, room, 0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def list_blocks(
    order, threshold, spare, indices, since, counts,
    first_tile, tiles, num_blocks, width, query_offset, query_length,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The blocks that some row of one tile keeps, ascending, and the first row that does."""
    here, lane = tl.program_id(0), tl.arange(0, LANES)
    number = (first_tile + here).to(tl.int64)
    row = (number % tiles).to(tl.int32) * TILE + lane
    exists = (lane < TILE) & (row < query_length)
    least = tl.load(threshold + here * TILE + lane, mask=exists, other=_HIGHEST)
    room = tl.load(spare + here * TILE + lane, mask=exists, other=0)
    order += here.to(tl.int64) * TILE * num_blocks
    last_row = query_offset + tl.minimum(((number % tiles).to(tl.int32) + 1) * TILE, query_length) - 1
    stop = tl.minimum(num_blocks, last_row // BLOCK_SIZE + 1)
    listed, equal = 0, tl.zeros([LANES], tl.int32)
    for start in range(0, stop, KEYS):
        block = start + tl.arange(0, KEYS)
        written = exists[:, None] & (block < num_blocks)[None, :]
        written = written & ((block * BLOCK_SIZE)[None, :] <= (query_offset + row)[:, None])
        ranked = tl.load(order + lane[:, None] * num_blocks + block[None, :], mask=written, other=_LOWEST)
        same = (ranked == least[:, None]) & written
        ties = equal[:, None] + tl.cumsum(same.to(tl.int32), 1)
        kept = ((ranked > least[:, None]) & written) | (same & (ties <= room[:, None]))
        first = tl.min(tl.where(kept, lane[:, None], LANES), 0)
        found = first < LANES
        place = listed + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(indices + number * width + place, block, mask=found)
        tl.store(since + number * width + place, first, mask=found)
        listed += tl.sum(found.to(tl.int32), 0)
        equal += tl.sum(same.to(tl.int32), 1)
    tl.store(counts + number, listed)
