"""Lists made ready on the device, in linear memory: full blocks first, and transposed.

A listed block is *full* for a group when each of the group's rows may see each of its keys, and *hidden* when none
sees any. Hidden ones are dropped here; full ones need no mask in the kernels that follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from astbench_kernels.layout import BlockLayout, ceil_div
from astbench_kernels.triton.launch import launch
from astbench_kernels.triton.plan import Plan, Tile, next_power_of_two
from astbench_kernels.triton.tiles import last_key

_HIDDEN, _PARTIAL, _FULL = 0, 1, 2
_SCAN = Tile(rows=1, keys=1, num_warps=1, num_stages=1)
_BLOCKWISE = Tile(rows=1, keys=1, num_warps=4, num_stages=1)
_ENTRIES_PER_PROGRAM = 1024


@dataclass(frozen=True)
class OrderedLists:
    """Each list with its full blocks first.

    Attributes:
        blocks: int32 `(batch, lists, groups, width)`: block numbers.
        slots: int32, the same shape: where in the caller's list each stands (block_bias is aligned with that).
        num_full: int32 `(batch, lists, groups)`.
        num_seen: int32 `(batch, lists, groups)`: full and partial ones.
        turns: int32 `(batch, lists, groups)`: groups, those with the longest lists first, so that none of them starts
            when all others are done.
    """

    blocks: Tensor
    slots: Tensor
    num_full: Tensor
    num_seen: Tensor
    turns: Tensor


@dataclass(frozen=True)
class TransposedLists:
    """For each key block the entries that name it.

    Attributes:
        entries: int32 `(batch, lists, groups * width)`: `group * width + slot`, cell after cell.
        starts: int32 `(batch, lists, cells + 1)`; cell `(block * 2 + partial) * chunks + chunk` holds the entries
            of one block, apart by whether it is full for the entry's group, and by chunk of groups.
        turns: int32 `(batch, kv_heads, blocks)`: key blocks, those that most entries name first.
        num_chunks: Chunks of groups.
    """

    entries: Tensor
    starts: Tensor
    turns: Tensor
    num_chunks: int


def block_states(plan: Plan, key_valid: Tensor | None, device: torch.device) -> Tensor:
    """int8 `(batch, blocks)`: whether none, some or all keys of a block are there to be seen."""
    if key_valid is None:
        states = torch.full((plan.num_blocks,), _FULL, dtype=torch.int8, device=device)
        if plan.key_length % plan.block_size:
            states[-1:] = _PARTIAL
        return states.expand(plan.batch, -1).contiguous()
    padded = torch.nn.functional.pad(key_valid, (0, plan.num_blocks * plan.block_size - plan.key_length))
    blocks = padded.view(plan.batch, plan.num_blocks, plan.block_size)
    return blocks.any(-1).to(torch.int8) + blocks.all(-1).to(torch.int8)


def order_lists(plan: Plan, layout: BlockLayout, states: Tensor, *, even: bool) -> OrderedLists:
    """Full blocks first; O(listed blocks) time and memory."""
    blocks = torch.empty_like(layout.indices, memory_format=torch.contiguous_format)
    slots = torch.empty_like(blocks)
    num_full, num_seen = torch.empty_like(layout.counts), torch.empty_like(layout.counts)
    launch(
        _order,
        plan.batch * plan.lists * plan.groups,
        {**_list_arguments(plan, layout, states), "blocks": blocks, "slots": slots}
        | {"num_full": num_full, "num_seen": num_seen},
        {**_list_constants(plan, layout, even), "BLOCK": min(1024, next_power_of_two(plan.width))},
        _SCAN,
    )
    return OrderedLists(blocks, slots, num_full, num_seen, _largest_first(num_seen))


def _largest_first(sizes: Tensor) -> Tensor:
    """Places along the last dimension; equal ones in their own order."""
    return sizes.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)


def transpose_lists(plan: Plan, layout: BlockLayout, states: Tensor, *, even: bool) -> TransposedLists:
    """Count, prefix sum, scatter; O(listed blocks + key blocks x chunks) time and memory.

    The order of entries within a cell is left to the hardware, unless torch is asked for deterministic algorithms;
    then a stable sort of all entries stands in for the scatter.
    """
    chunks, cells = plan.num_chunks, plan.num_blocks * 2 * plan.num_chunks
    device, leading = layout.indices.device, (plan.batch, plan.lists)
    counts = torch.zeros(*leading, cells, dtype=torch.int32, device=device)
    entries = torch.empty(*leading, plan.groups * plan.width, dtype=torch.int32, device=device)
    arguments = {**_list_arguments(plan, layout, states), "num_cells": cells, "num_chunks": chunks}
    arguments["groups_per_chunk"] = plan.groups_per_chunk if plan.schedule == "key_major" else plan.groups
    programs = plan.batch * plan.lists * ceil_div(plan.groups * plan.width, _ENTRIES_PER_PROGRAM)
    constants = {**_list_constants(plan, layout, even), "BLOCK": _ENTRIES_PER_PROGRAM}
    launch(_count, programs, {**arguments, "counts_of_cells": counts}, constants, _BLOCKWISE)
    starts = torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
    ordered = torch.are_deterministic_algorithms_enabled()
    cursors = starts.clone()
    arguments |= {"cursors": cursors, "entries": entries}
    launch(_scatter, programs, arguments, {**constants, "CELLS_ONLY": ordered}, _BLOCKWISE)
    if ordered:
        entries = entries.sort(dim=-1, stable=True).indices.to(torch.int32)
    named = starts[..., :: 2 * chunks].diff(dim=-1)
    if plan.lists > plan.kv_heads:  # those of one key/value head are neighbours
        named = named.unflatten(1, (plan.kv_heads, -1)).sum(2)
    turns = _largest_first(named).expand(-1, plan.kv_heads, -1).contiguous()
    return TransposedLists(entries, starts, turns, chunks)


def _list_arguments(plan: Plan, layout: BlockLayout, states: Tensor) -> dict[str, object]:
    return {
        "indices": layout.indices.contiguous(),
        "counts": layout.counts.contiguous(),
        "since": layout.indices if layout.since is None else layout.since.contiguous(),
        "states": states,
        "lists": plan.lists,
        "groups": plan.groups,
        "width": plan.width,
        "num_blocks": plan.num_blocks,
        "first_group": plan.first_group,
        "query_offset": plan.query_offset,
        "query_length": plan.query_length,
    }


def _list_constants(plan: Plan, layout: BlockLayout, even: bool) -> dict[str, object]:
    return {
        "CAUSAL": plan.causal,
        "HAS_SINCE": layout.since is not None,
        "KEY_STRIDE": plan.key_stride,
        "EVEN": even,
        "BLOCK_SIZE": plan.block_size,
        "GROUP": plan.query_group,
    }


_SIZES = ["lists", "groups", "width", "num_blocks", "first_group", "query_offset", "query_length"]


@triton.jit
def _classify(
    block,
    live,
    group,
    since,
    states,
    first_group,
    query_offset,
    query_length,
    CAUSAL: tl.constexpr,
    HAS_SINCE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(seen, full) of listed blocks for the rows of their groups."""
    state = tl.load(states + block, mask=live, other=0)
    seen = live & (state > 0)
    full = live & (state == 2)
    if CAUSAL:
        first = tl.maximum((first_group + group) * GROUP, query_offset)
        last = tl.minimum((first_group + group + 1) * GROUP, query_offset + query_length) - 1
        seen = seen & (block * BLOCK_SIZE <= last_key(last, KEY_STRIDE))
        full = full & (block * BLOCK_SIZE + (BLOCK_SIZE - 1) <= last_key(first, KEY_STRIDE))
    if HAS_SINCE:
        begin = (first_group + group) * GROUP
        stop = tl.minimum(begin + GROUP, query_offset + query_length)
        rank = tl.load(since, mask=live, other=0)
        seen = seen & (begin + rank < stop)
        full = full & (rank == 0)
    if not EVEN:
        full = full & (state > 2)
    return seen, full


@triton.jit(do_not_specialize=_SIZES)
def _order(
    indices,
    counts,
    since,
    states,
    blocks,
    slots,
    num_full,
    num_seen,
    lists,
    groups,
    width,
    num_blocks,
    first_group,
    query_offset,
    query_length,
    CAUSAL: tl.constexpr,
    HAS_SINCE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program is one list, read twice: the partial blocks go behind the full ones, which are counted first."""
    unit = tl.program_id(0)
    group = unit % groups
    states += (unit // groups // lists) * num_blocks
    base = unit.to(tl.int64) * width
    count = tl.load(counts + unit)
    fulls = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        live = place < count
        block = tl.load(indices + base + place, mask=live, other=0)
        seen, full = _classify(
            block, live, group, since + base + place, states, first_group, query_offset, query_length,
            CAUSAL, HAS_SINCE, KEY_STRIDE, EVEN, BLOCK_SIZE, GROUP,
        )  # fmt: skip
        fulls += tl.sum(full.to(tl.int32), 0)
    done_full, done_partial = 0, fulls
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        live = place < count
        block = tl.load(indices + base + place, mask=live, other=0)
        seen, full = _classify(
            block, live, group, since + base + place, states, first_group, query_offset, query_length,
            CAUSAL, HAS_SINCE, KEY_STRIDE, EVEN, BLOCK_SIZE, GROUP,
        )  # fmt: skip
        is_full, is_partial = full.to(tl.int32), (seen & (full == 0)).to(tl.int32)
        target = tl.where(full, done_full + tl.cumsum(is_full, 0) - 1, done_partial + tl.cumsum(is_partial, 0) - 1)
        tl.store(blocks + base + target, block, mask=seen)
        tl.store(slots + base + target, place, mask=seen)
        done_full += tl.sum(is_full, 0)
        done_partial += tl.sum(is_partial, 0)
    tl.store(num_full + unit, fulls)
    tl.store(num_seen + unit, done_partial)


@triton.jit
def _cells_of_entries(
    indices,
    counts,
    since,
    states,
    lists,
    groups,
    width,
    num_blocks,
    num_chunks,
    groups_per_chunk,
    first_group,
    query_offset,
    query_length,
    CAUSAL: tl.constexpr,
    HAS_SINCE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(list, entries of its table, their cells, whether they are seen, whether they exist)."""
    per_list = tl.cdiv(groups * width, BLOCK)
    unit = tl.program_id(0) // per_list
    entry = (tl.program_id(0) % per_list) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < groups * width
    group, slot = entry // width, entry % width
    count = tl.load(counts + unit.to(tl.int64) * groups + group, mask=exists, other=0)
    live = exists & (slot < count)
    block = tl.load(indices + unit.to(tl.int64) * groups * width + entry, mask=live, other=0)
    states += (unit // lists) * num_blocks
    seen, full = _classify(
        block, live, group, since + unit.to(tl.int64) * groups * width + entry, states,
        first_group, query_offset, query_length, CAUSAL, HAS_SINCE, KEY_STRIDE, EVEN, BLOCK_SIZE, GROUP,
    )  # fmt: skip
    cell = (block * 2 + tl.where(full, 0, 1)) * num_chunks + group // groups_per_chunk
    return unit.to(tl.int64), entry, cell, seen, exists


@triton.jit(do_not_specialize=[*_SIZES, "num_cells", "num_chunks", "groups_per_chunk"])
def _count(
    indices,
    counts,
    since,
    states,
    counts_of_cells,
    lists,
    groups,
    width,
    num_blocks,
    num_cells,
    num_chunks,
    groups_per_chunk,
    first_group,
    query_offset,
    query_length,
    CAUSAL: tl.constexpr,
    HAS_SINCE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit, _entry, cell, seen, _exists = _cells_of_entries(
        indices, counts, since, states, lists, groups, width, num_blocks, num_chunks, groups_per_chunk,
        first_group, query_offset, query_length, CAUSAL, HAS_SINCE, KEY_STRIDE, EVEN, BLOCK_SIZE, GROUP, BLOCK,
    )  # fmt: skip
    tl.atomic_add(counts_of_cells + unit * num_cells + cell, 1, mask=seen)


@triton.jit(do_not_specialize=[*_SIZES, "num_cells", "num_chunks", "groups_per_chunk"])
def _scatter(
    indices,
    counts,
    since,
    states,
    cursors,
    entries,
    lists,
    groups,
    width,
    num_blocks,
    num_cells,
    num_chunks,
    groups_per_chunk,
    first_group,
    query_offset,
    query_length,
    CAUSAL: tl.constexpr,
    HAS_SINCE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS_ONLY: tl.constexpr,
):
    """Each entry goes where its cell's cursor stands; CELLS_ONLY writes the cells themselves, for a stable sort."""
    unit, entry, cell, seen, exists = _cells_of_entries(
        indices, counts, since, states, lists, groups, width, num_blocks, num_chunks, groups_per_chunk,
        first_group, query_offset, query_length, CAUSAL, HAS_SINCE, KEY_STRIDE, EVEN, BLOCK_SIZE, GROUP, BLOCK,
    )  # fmt: skip
    entries += unit * groups * width
    if CELLS_ONLY:
        tl.store(entries + entry, tl.where(seen, cell, num_cells), mask=exists)
    else:
        place = tl.atomic_add(cursors + unit * (num_cells + 1) + cell, 1, mask=seen)
        tl.store(entries + place, entry, mask=seen)
