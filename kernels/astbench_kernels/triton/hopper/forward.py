"""Block-sparse attention, forward, for compute capability 9.0: TMA, wgmma, warp specialisation.

One program is a producer warp and one or two warpgroups of 64 query rows each. The producer reads the listed key blocks
into a ring of tiles in shared memory, as far ahead as the ring has room; the warpgroups multiply. A warpgroup has the
product with the next keys under way while it exponentiates, and so has its neighbour: the tensor cores always have
work. With two warpgroups programs stay, one a multiprocessor, and take one tile after the other: the producer reads
the next tile's rows while the last one is finished.

Full blocks come first in a list, then partial ones, which are masked. Between an asynchronous wgmma and its wait
nothing may move its registers; so the two have loops of their own, and no mask meets a product under way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from astbench_kernels.triton.hopper.pieces import allowed_of, bias_of, last_key, produce_keys, steps_of, tile_of


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    blocks, num_full, num_seen, turns, num_tiles, width, groups, first_group, query_offset,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr, GROUP: gl.constexpr,
    TILES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DIM: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = DIM // 64
    BOXES: gl.constexpr = KEYS // BLOCK if KEYS > BLOCK else 1
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head_group, group, part, listed, full, seen = tile_of(
            tile, turns, num_full, num_seen, groups, LISTS, HEAD_GROUPS, TILES
        )
        _unmasked, steps = steps_of(full, seen, BLOCK, KEYS)
        kv_head = head_group * KV_HEADS // HEAD_GROUPS
        mine = blocks + listed.to(gl.int64) * width
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, CONSUMERS * 64 * DIM * 2)
        for which in gl.static_range(CONSUMERS):
            row = (first_group + group) * GROUP - query_offset + (part * CONSUMERS + which) * (64 // EACH)
            for p in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    q_desc, [batch, row, head_group * EACH, p * 64], q_full, q_buf.index(which * PARTS + p)
                )
        turn += 1
        count = produce_keys(
            k_desc, v_desc, k_buf, v_buf, k_full, k_empty, v_full, v_empty, count, batch, kv_head, mine, seen, steps,
            BOXES, PARTS, BLOCK, KEYS, STAGES, DIM,
        )  # fmt: skip


@gluon.jit
def _softmax(logits, highest, total, scale, addend, HAS_BIAS: gl.constexpr):
    """(weights, highest, total, what earlier sums shrink by) in base 2; a row that saw nothing yet has -inf, 0."""
    if HAS_BIAS:
        logits = logits * scale + addend[None, :]
        higher = gl.maximum(highest, gl.max(logits, 1))
        pivot = gl.where(higher == -float("inf"), 0.0, higher)
        weights = gl.exp2(logits - pivot[:, None])
    else:
        higher = gl.maximum(highest, gl.max(logits, 1) * scale)
        pivot = gl.where(higher == -float("inf"), 0.0, higher)
        weights = gl.exp2(logits * scale - pivot[:, None])
    shrink = gl.exp2(highest - pivot)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _consumer(
    q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    blocks, slots, num_full, num_seen, turns, bias, since, out, lse, scale,
    num_tiles, width, groups, first_group, query_offset, query_length, key_length,
    WHICH: gl.constexpr, LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, HEADS: gl.constexpr, EACH: gl.constexpr,
    GROUP: gl.constexpr, TILES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, DIM: gl.constexpr, REAL_DIM: gl.constexpr, CAUSAL: gl.constexpr, KEY_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SINCE: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_buf.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)  # weights as they come out of SCORES: nothing moves
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = q_buf._reinterpret(DTYPE, [CONSUMERS, 64, DIM], SHARED).index(WHICH)
    keys = k_buf._reinterpret(DTYPE, [STAGES, KEYS, DIM], SHARED)
    values = v_buf._reinterpret(DTYPE, [STAGES, KEYS, DIM], SHARED)
    zeros = gl.full([64, KEYS], 0.0, gl.float32, SCORES)
    column = gl.arange(0, KEYS, COLUMN)
    none = gl.full([KEYS], 0.0, gl.float32, COLUMN)
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head_group, group, part, listed, full, seen = tile_of(
            tile, turns, num_full, num_seen, groups, LISTS, HEAD_GROUPS, TILES
        )
        unmasked, steps = steps_of(full, seen, BLOCK, KEYS)
        table = listed.to(gl.int64) * width
        mine, places, biases, firsts = blocks + table, slots + table, bias + table, since + table
        index = (part * CONSUMERS + WHICH) * 64 + gl.arange(0, 64, ROW)
        rank = index // EACH
        position = (first_group + group) * GROUP + rank
        last = last_key(position, KEY_STRIDE)
        highest = gl.full([64], -float("inf"), gl.float32, ROW)
        total = gl.full([64], 0.0, gl.float32, ROW)
        acc = gl.full([64, DIM], 0.0, gl.float32, SUMS)
        mbarrier.wait(q_full, turn & 1)
        if IN_REGISTERS:
            left = queries.load(gl.DotOperandLayout(0, SCORES, 2))
        else:
            left = queries
        turn += 1
        if steps > 0:
            stage = count % STAGES
            addend = none
            if HAS_BIAS:
                addend = bias_of(biases, places, seen, 0, column, BLOCK, KEYS)
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            logits = warpgroup_mma(left, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(0, deps=[logits])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if unmasked <= 0:
                allowed = allowed_of(
                    mine, places, firsts, seen, 0, last, rank, key_length, SCORES, CAUSAL, HAS_SINCE, BLOCK, KEYS
                )
                logits = gl.where(allowed, logits, -float("inf"))
            weights, highest, total, shrink = _softmax(logits, highest, total, scale, addend, HAS_BIAS)
            packed = gl.convert_layout(weights.to(DTYPE), LEFT)
            # Full blocks. The product with the next keys, and that of the last weights with their values, are under
            # way while this step's weights are computed.
            for step in range(1, unmasked):
                before = count % STAGES
                before_phase = (count // STAGES) & 1
                count += 1
                stage = count % STAGES
                if HAS_BIAS:
                    addend = bias_of(biases, places, seen, step, column, BLOCK, KEYS)
                mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
                logits = warpgroup_mma(left, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), before_phase)
                acc = warpgroup_mma(packed, values.index(before), acc, is_async=True)
                logits = warpgroup_mma_wait(1, deps=[logits])
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, highest, total, shrink = _softmax(logits, highest, total, scale, addend, HAS_BIAS)
                acc, packed = warpgroup_mma_wait(0, deps=[acc, packed])
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
                packed = gl.convert_layout(weights.to(DTYPE), LEFT)
            # Partial blocks, one product after the other.
            for step in range(gl.maximum(unmasked, 1), steps):
                before = count % STAGES
                before_phase = (count // STAGES) & 1
                count += 1
                stage = count % STAGES
                if HAS_BIAS:
                    addend = bias_of(biases, places, seen, step, column, BLOCK, KEYS)
                mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
                logits = warpgroup_mma(left, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), before_phase)
                acc = warpgroup_mma(packed, values.index(before), acc, is_async=True)
                acc, packed, logits = warpgroup_mma_wait(0, deps=[acc, packed, logits])
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.arrive(v_empty.index(before), count=1)
                allowed = allowed_of(
                    mine, places, firsts, seen, step, last, rank, key_length, SCORES, CAUSAL, HAS_SINCE, BLOCK, KEYS
                )
                logits = gl.where(allowed, logits, -float("inf"))
                weights, highest, total, shrink = _softmax(logits, highest, total, scale, addend, HAS_BIAS)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
                packed = gl.convert_layout(weights.to(DTYPE), LEFT)
            mbarrier.arrive(q_empty, count=1)
            stage = count % STAGES
            mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
            acc = warpgroup_mma(packed, values.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            count += 1
        else:
            mbarrier.arrive(q_empty, count=1)
        # Rows that see nothing have total 0: output 0, log-sum-exp -inf.
        safe = gl.where(total > 0, total, 1.0)
        row = position - query_offset
        exists = (row >= 0) & (row < query_length)
        target = (batch * HEADS + head_group * EACH + index % EACH).to(gl.int64) * query_length + row
        known = gl.where(total > 0, (highest + gl.log2(safe)) * 0.6931471805599453, -float("inf"))
        gl.store(lse + target, known, mask=exists)
        acc = acc * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, SUMS))[:, None]
        target = gl.convert_layout(target, gl.SliceLayout(1, SUMS))
        exists = gl.convert_layout(exists, gl.SliceLayout(1, SUMS))
        dim = gl.arange(0, DIM, gl.SliceLayout(0, SUMS))
        pointers = out + target[:, None] * REAL_DIM + dim[None, :]
        if REAL_DIM == DIM:
            gl.store(pointers, acc.to(DTYPE), mask=exists[:, None] & (dim >= 0)[None, :])
        else:
            gl.store(pointers, acc.to(DTYPE), mask=exists[:, None] & (dim < REAL_DIM)[None, :])


_SIZES = ["num_tiles", "width", "groups", "first_group", "query_offset", "query_length", "key_length"]


@gluon.jit(do_not_specialize=_SIZES)
def forward(
    q_desc, k_desc, v_desc, blocks, slots, num_full, num_seen, turns, bias, since, out, lse, scale,
    num_tiles, width, groups, first_group, query_offset, query_length, key_length,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr,
    GROUP: gl.constexpr, TILES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, DIM: gl.constexpr, REAL_DIM: gl.constexpr, CAUSAL: gl.constexpr, KEY_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SINCE: gl.constexpr, IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Writes `out` `(batch, heads, query_length, REAL_DIM)` and `lse` (natural log), both contiguous."""
    PARTS: gl.constexpr = DIM // 64
    BOXES: gl.constexpr = KEYS // BLOCK if KEYS > BLOCK else 1
    BOX: gl.constexpr = KEYS // BOXES
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_buf = gl.allocate_shared_memory(DTYPE, [CONSUMERS * PARTS, 1, 64 // EACH, EACH, 64], TILE)
    k_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS * BOXES, 1, 1, BOX, 64], TILE)
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS * BOXES, 1, 1, BOX, 64], TILE)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    # Tuples of constants have to be written where they are used: a variable would make them run-time values.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, slots, num_full, num_seen, turns, bias, since, out, lse, scale,
                    num_tiles, width, groups, first_group, query_offset, query_length, key_length,
                    0, LISTS, HEAD_GROUPS, HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, KEYS, STAGES, DIM, REAL_DIM,
                    CAUSAL, KEY_STRIDE, HAS_BIAS, HAS_SINCE, IN_REGISTERS)),
                (_consumer, (
                    q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, slots, num_full, num_seen, turns, bias, since, out, lse, scale,
                    num_tiles, width, groups, first_group, query_offset, query_length, key_length,
                    1, LISTS, HEAD_GROUPS, HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, KEYS, STAGES, DIM, REAL_DIM,
                    CAUSAL, KEY_STRIDE, HAS_BIAS, HAS_SINCE, IN_REGISTERS)),
                (_producer, (
                    q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, num_full, num_seen, turns, num_tiles, width, groups, first_group, query_offset,
                    LISTS, HEAD_GROUPS, KV_HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, KEYS, STAGES, DIM)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, slots, num_full, num_seen, turns, bias, since, out, lse, scale,
                    num_tiles, width, groups, first_group, query_offset, query_length, key_length,
                    0, LISTS, HEAD_GROUPS, HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, KEYS, STAGES, DIM, REAL_DIM,
                    CAUSAL, KEY_STRIDE, HAS_BIAS, HAS_SINCE, IN_REGISTERS)),
                (_producer, (
                    q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, num_full, num_seen, turns, num_tiles, width, groups, first_group, query_offset,
                    LISTS, HEAD_GROUPS, KV_HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, KEYS, STAGES, DIM)),
            ],
            [1], [24],
        )  # fmt: skip
