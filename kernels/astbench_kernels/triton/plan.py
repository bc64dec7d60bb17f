"""What follows from the shapes of a call alone: the schedule, the tiles, the sizes of the grids.

Nothing here reads a tensor's values, so a call never waits for the device and can be captured in a CUDA graph.

A *head_group* is the set of query heads that share both a list and a key-value head; its rows in one query group are
packed into one tile. Lists may be coarser than key-value heads (one list for all) or finer (one per query head).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from astbench_kernels.dispatch import hopper as hopper_rules
from astbench_kernels.dispatch import rules
from astbench_kernels.layout import BlockLayout, ceil_div
from astbench_kernels.triton import has_gluon

Schedule = Literal["query_major", "key_major", "decode", "hopper"]
"""Who walks over what: tiles of query rows over their lists, key blocks over the rows that chose them, or, without
gradients, few query rows over lists that several programs share out. "hopper" is query-major by kernels that only
compute capability 9.0 can run (:mod:`astbench_kernels.triton.hopper`)."""

STEPS_PER_SPLIT = 2
"""Fewer steps through a list than this are not worth a program and its part of the merging. Not measured yet."""

MAX_SPLITS = 128
"""Most programs that share one list; a power of two, since the merging kernel holds a number for each."""


@dataclass(frozen=True)
class Tile:
    """Shape of one program: query rows and keys it multiplies at a time, and how Triton is to run it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """The sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    lists: int
    groups: int
    width: int
    block_size: int
    num_blocks: int
    query_group: int
    query_length: int
    key_length: int
    query_offset: int
    key_stride: int
    head_dim: int
    value_dim: int
    causal: bool
    half: bool
    schedule: Schedule
    arch: int
    processors: int
    one_pass: bool = False

    @property
    def adds_up_queries(self) -> bool:
        """Whether the key blocks' programs of the backward pass add up the queries' gradients too, in float32.

        Additions of many programs to one row come in any order: not where torch is asked for a fixed one.
        """
        wanted = self.one_pass or self.schedule == "key_major"
        return wanted and not torch.are_deterministic_algorithms_enabled()

    @property
    def widest(self) -> int:
        """The larger head size, as the kernels hold it."""
        return padded_dim(max(self.head_dim, self.value_dim))

    @property
    def head_groups(self) -> int:
        """Head groups per batch element."""
        return max(self.lists, self.kv_heads)

    @property
    def heads_per_head_group(self) -> int:
        """Query heads that share list and keys."""
        return self.heads // self.head_groups

    @property
    def rows_per_list(self) -> int:
        """Query rows of one head group in one group."""
        return self.query_group * self.heads_per_head_group

    @property
    def first_group(self) -> int:
        """Absolute number of the group of query row 0."""
        return self.query_offset // self.query_group

    @property
    def padded_block(self) -> int:
        """Keys of a block, rounded up to what `tl.arange` can count."""
        return next_power_of_two(self.block_size)

    @property
    def groups_per_chunk(self) -> int:
        """Query groups whose partial outputs fit in PARTIAL_BYTES together."""
        value_bytes = self.value_dim * (2 if self.half else 4) + 4
        parts = ceil_div(self.block_size, self.key_major_tile().keys)
        per_group = self.batch * self.heads * self.query_group * self.width * parts * value_bytes
        return min(self.groups, max(1, rules.PARTIAL_BYTES // per_group))

    @property
    def num_chunks(self) -> int:
        """Rounds of the key-major forward; 1 where only the backward pass needs transposed lists."""
        return ceil_div(self.groups, self.groups_per_chunk) if self.schedule == "key_major" else 1

    def query_major_tile(self, *, backward: bool = False) -> Tile:
        """One program is up to `rows` rows of one list; block sizes under `keys` are read several at a time.

        All tiles were chosen so that nothing spills (`astbench_kernels.triton.report`); none is measured yet.
        """
        most = max(16, next_power_of_two(self.rows_per_list))
        if not self.half:
            return Tile(min(most, 16 if backward else 32), 32, 8, 2)
        if self.widest > 128:
            return Tile(min(most, 64), 32, 8, 2)
        # mma.sync holds queries and their gradients in registers, wgmma reads them from shared memory.
        keys = 32 if (self.arch < 90 and self.widest > 64) or (backward and most == 16) else 64
        rows = min(most, 64 if backward or keys == 32 else 128)
        return Tile(rows, keys, 8 if rows == 128 else 4, 2 if backward else 3)

    def key_major_tile(self, *, backward: bool = False) -> Tile:
        """One program is one key block (or `keys` keys of it) and walks over the rows that chose it."""
        most = max(16, self.padded_block)
        if not self.half:
            return Tile(16, min(most, 16 if backward else 32), 8, 2)
        if self.widest > 128:
            return Tile(16, min(most, 32), 8, 2) if backward else Tile(32, min(most, 32), 4, 2)
        keys = min(most, 64)
        if not backward:
            return Tile(64, keys, 4, 2)
        # The gradient of the rows is one more accumulator.
        alone = self.schedule == "query_major" and not self.one_pass
        rows = 32 if alone or self.arch >= 90 or self.widest <= 64 else 16
        return Tile(rows, keys, 8 if keys == 64 else 4, 2)

    def decode_tile(self) -> Tile:
        """One program is up to `rows` query rows and its share of one list, of which it reads `keys` at a time.

        Like the others chosen so that nothing spills (64 rows of head size 128 do), and not measured yet.
        """
        rows = max(16, next_power_of_two(self.rows_per_group))
        if not self.half:
            return Tile(rules.DECODE_TILE_ROWS_FLOAT32, 32, 8, 2 + self._ahead(32))
        most = 128 if self.widest <= 64 else 64 if self.widest <= 128 else 32
        keys = min(most, max(64, self.padded_block))
        return Tile(min(rows, rules.DECODE_TILE_ROWS), keys, 4, 3 + self._ahead(keys))

    def _ahead(self, keys: int) -> int:
        """Stages for the numbers of blocks, which a tile of several blocks loads before it can load their keys."""
        return 2 if self.padded_block < keys else 0

    @property
    def rows_per_group(self) -> int:
        """Query rows of one head group in one group that there are in this call."""
        return min(self.query_group, self.query_length) * self.heads_per_head_group

    @property
    def decode_tiles(self) -> int:
        """Decode programs of one call if no list is split."""
        return self.batch * self.head_groups * self.groups * ceil_div(self.rows_per_group, self.decode_tile().rows)

    @property
    def num_splits(self) -> int:
        """Decode programs that share one list: enough to fill the device, each with something to do.

        From the width of the lists and not from their counts, which only the device knows.
        """
        steps = ceil_div(self.width * self.padded_block, self.decode_tile().keys)
        fill = self.processors * rules.PROGRAMS_PER_PROCESSOR // self.decode_tiles
        return max(1, min(fill, steps // STEPS_PER_SPLIT, MAX_SPLITS))

    def query_major_even(self, *, backward: bool = False) -> bool:
        """Whether whole blocks fill whole query-major tiles, so that none of their keys needs a mask."""
        keys = self.query_major_tile(backward=backward).keys
        return self.block_size % keys == 0 if self.block_size > keys else self.block_size == self.padded_block

    def key_major_even(self, *, backward: bool = False) -> bool:
        """The same for key-major tiles."""
        return self.block_size % self.key_major_tile(backward=backward).keys == 0


def make_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool,
    schedule: Schedule | None = None,
    arch: int | None = None,
    gradients: bool = True,
    one_pass: bool = False,
    padded: bool = False,
    hopper: bool | None = None,
) -> Plan:
    """The plan of a call; `schedule` overrides the rule, `arch` the device, for tests and measurements.

    With `one_pass` there is one backward pass, over the key blocks, where rows share lists too. `padded` says whether
    keys may be padding (`key_valid`). `hopper` False leaves the Hopper kernels out, True takes them wherever they serve
    the call; None takes them where :func:`astbench_kernels.dispatch.hopper.is_default` says so.

    The rule, where `gradients` are wanted: rows that share a list and keys run query-major when there are at least
    MIN_ROWS_PER_LIST of them, for then a tile of them fills a matrix instruction and reads each listed key block
    once; with fewer, each key block gathers the rows that chose it.

    Where none are wanted, up to DECODE_ROWS rows of a head group run by the decode schedule if they are one tile, for
    then it reads each listed block once and needs no lists made ready; or if their tiles would not fill the device.

    Carried lists (`layout.since`) are never run key-major.

    Raises:
        ValueError: more rows or entries than 32 bits count, or the decode schedule where gradients are wanted, or
            the key-major one for carried lists, or the Hopper kernels for what they do not serve.
    """
    lists, groups, width = layout.indices.shape[1:]
    if groups * width >= 2**31:
        raise ValueError(f"{groups} query groups x {width} listed blocks do not fit 32 bits; raise query_group")
    head_group = q.shape[1] // max(lists, k.shape[1]) * q.shape[2] * max(q.shape[-1], v.shape[-1])
    if head_group >= 2**31:
        raise ValueError(f"{q.shape[2]} queries of the heads that share a list do not fit 32 bits; use more lists")
    if schedule == "decode" and gradients:
        raise ValueError("schedule 'decode' has no backward pass, but gradients are wanted; call it under no_grad")
    plan = Plan(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        lists=lists,
        groups=groups,
        width=width,
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        query_group=layout.query_group,
        query_length=layout.query_length,
        key_length=layout.key_length,
        query_offset=layout.query_offset,
        key_stride=layout.key_stride,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        causal=causal,
        half=q.dtype != torch.float32,
        schedule=schedule or "query_major",
        arch=arch or _arch(q.device),
        processors=_processors(q.device),
        one_pass=one_pass,
    )
    if hopper or schedule == "hopper":
        if reasons := hopper_refusals(plan, q.dtype, padded=padded):
            raise ValueError(f"the Hopper kernels cannot serve this call: {'; '.join(reasons)}; set backend to triton")
        return replace(plan, schedule="hopper")
    if schedule is None:
        schedule = _rule(plan, gradients)
        if hopper is None and schedule == "query_major" and _takes_hopper(plan, q, layout, padded=padded):
            schedule = "hopper"
        if layout.since is not None and schedule == "key_major":  # it has no place for a row's first key blocks
            schedule = "query_major"
    elif layout.since is not None and schedule == "key_major":
        raise ValueError("schedule 'key_major' takes no carried lists (layout.since); leave it out")
    return replace(plan, schedule=schedule)


def _rule(plan: Plan, gradients: bool) -> Schedule:
    """See :func:`make_plan`."""
    rows = plan.query_length * plan.heads_per_head_group
    if not gradients and rules.is_decode(rows, plan.decode_tiles, plan.batch * plan.head_groups, plan.processors):
        return "decode"
    return rules.triton_schedule(plan.rows_per_list)


def hopper_refusals(plan: Plan, dtype: torch.dtype, *, padded: bool) -> list[str]:
    """Every reason why the Hopper kernels cannot serve a call."""
    reasons = hopper_rules.refusals(
        capability=plan.arch,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=plan.head_dim,
        value_dim=plan.value_dim,
        block_size=plan.block_size,
        rows=plan.rows_per_list,
        heads_per_list=plan.heads_per_head_group,
        padded=padded,
    )
    if plan.one_pass:
        reasons.append("one backward pass is asked for, and they have two")
    return reasons if has_gluon() else [*reasons, "this triton has no Gluon (triton.experimental.gluon)"]


def _takes_hopper(plan: Plan, q: Tensor, layout: BlockLayout, *, padded: bool) -> bool:
    """On a device of their own, where they are the default for such shapes and serve the call."""
    carried = layout.since is not None
    default = hopper_rules.is_default(plan.rows_per_list, plan.block_size, plan.head_dim, carried=carried)
    return _on_cuda(q.device) and default and not hopper_refusals(plan, q.dtype, padded=padded)


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _arch(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; the interpreter on the CPU stands in for the newest."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return rules.ASSUMED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def padded_dim(dim: int) -> int:
    """A head size as the kernels hold it: matrix instructions start at 16."""
    return max(16, next_power_of_two(dim))
