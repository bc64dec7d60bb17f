"""Gradient of the queries, and of block_bias, for compute capability 9.0: query-major like the forward pass.

A producer warp streams the listed keys and values through shared memory; one or two warpgroups of 64 rows hold the
gradient of their queries in registers. Logits, the gradient of the weights and the previous step's product with the
keys are under way together. A step is 64 keys.

A pass of its own: one pass for all gradients would add 64 KiB of float32 to L2 a step, in any order, so that the same
inputs gave other sums each time.
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
    q_desc, o_desc, k_desc, v_desc, q_buf, o_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    blocks, num_full, num_seen, turns, num_tiles, width, groups, first_group, query_offset,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr, GROUP: gl.constexpr,
    TILES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = DIM // 64
    BOXES: gl.constexpr = 64 // BLOCK if BLOCK < 64 else 1
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head_group, group, part, listed, full, seen = tile_of(
            tile, turns, num_full, num_seen, groups, LISTS, HEAD_GROUPS, TILES
        )
        _unmasked, steps = steps_of(full, seen, BLOCK, 64)
        kv_head = head_group * KV_HEADS // HEAD_GROUPS
        mine = blocks + listed.to(gl.int64) * width
        head = head_group * EACH
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * CONSUMERS * 64 * DIM * 2)
        for which in gl.static_range(CONSUMERS):
            row = (first_group + group) * GROUP - query_offset + (part * CONSUMERS + which) * (64 // EACH)
            for p in gl.static_range(PARTS):
                at = which * PARTS + p
                tma.async_copy_global_to_shared(q_desc, [batch, row, head, p * 64], q_full, q_buf.index(at))
                tma.async_copy_global_to_shared(o_desc, [batch, row, head, p * 64], q_full, o_buf.index(at))
        turn += 1
        count = produce_keys(
            k_desc, v_desc, k_buf, v_buf, k_full, k_empty, v_full, v_empty, count, batch, kv_head, mine, seen, steps,
            BOXES, PARTS, BLOCK, 64, STAGES, DIM,
        )  # fmt: skip


@gluon.jit
def _weights(logits, known, scale, addend, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        return gl.exp2(logits * scale + (addend[None, :] - known[:, None]))
    else:
        return gl.exp2(logits * scale - known[:, None])


@gluon.jit
def _keep_bias(d_logits, d_bias, slots, seen, step, BLOCK: gl.constexpr):
    """The gradient of a block's bias, over this warpgroup's rows; no other warpgroup writes there."""
    if BLOCK == 64:
        gl.store(d_bias + gl.load(slots + step), gl.sum(gl.sum(d_logits, 1), 0))
    elif BLOCK > 64:  # the parts of a block follow one another: the order of the sum is fixed
        gl.atomic_add(d_bias + gl.load(slots + step // (BLOCK // 64)), gl.sum(gl.sum(d_logits, 1), 0), sem="relaxed")
    else:
        sums = gl.sum(gl.reshape(gl.sum(d_logits, 0), [64 // BLOCK, BLOCK]), 1)
        place = step * (64 // BLOCK) + gl.arange(0, 64 // BLOCK, sums.type.layout)
        there = place < seen
        gl.store(d_bias + gl.load(slots + place, mask=there, other=0), sums, mask=there)


@gluon.jit
def _consumer(
    q_buf, o_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    blocks, slots, num_full, num_seen, turns, bias, since, lse2, delta, d_q, d_bias, scale, softmax_scale,
    num_tiles, width, groups, first_group, query_offset, query_length, key_length, length,
    WHICH: gl.constexpr, LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, HEADS: gl.constexpr, EACH: gl.constexpr,
    GROUP: gl.constexpr, TILES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    DIM: gl.constexpr, REAL_DIM: gl.constexpr, CAUSAL: gl.constexpr, KEY_STRIDE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SINCE: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_buf.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = q_buf._reinterpret(DTYPE, [CONSUMERS, 64, DIM], SHARED).index(WHICH)
    grads = o_buf._reinterpret(DTYPE, [CONSUMERS, 64, DIM], SHARED).index(WHICH)
    keys = k_buf._reinterpret(DTYPE, [STAGES, 64, DIM], SHARED)
    values = v_buf._reinterpret(DTYPE, [STAGES, 64, DIM], SHARED)
    zeros = gl.full([64, 64], 0.0, gl.float32, SCORES)
    column = gl.arange(0, 64, COLUMN)
    none = gl.full([64], 0.0, gl.float32, COLUMN)
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head_group, group, part, listed, full, seen = tile_of(
            tile, turns, num_full, num_seen, groups, LISTS, HEAD_GROUPS, TILES
        )
        unmasked, steps = steps_of(full, seen, BLOCK, 64)
        table = listed.to(gl.int64) * width
        mine, places, biases, firsts = blocks + table, slots + table, bias + table, since + table
        unit = (batch * HEAD_GROUPS + head_group).to(gl.int64)
        own = d_bias + (((unit * groups + group) * TILES + part) * CONSUMERS + WHICH) * width
        index = (part * CONSUMERS + WHICH) * 64 + gl.arange(0, 64, ROW)
        rank = index // EACH
        position = (first_group + group) * GROUP + rank
        last = last_key(position, KEY_STRIDE)
        place = unit * length + group * (GROUP * EACH) + index
        known = gl.load(lse2 + place)
        shift = gl.load(delta + place)
        acc = gl.full([64, DIM], 0.0, gl.float32, SUMS)
        mbarrier.wait(q_full, turn & 1)
        if IN_REGISTERS:
            left = queries.load(gl.DotOperandLayout(0, SCORES, 2))
        else:
            left = queries
        turn += 1
        if steps > 0:
            stage = count % STAGES
            phase = (count // STAGES) & 1
            addend = none
            if HAS_BIAS:
                addend = bias_of(biases, places, seen, 0, column, BLOCK, 64)
            mbarrier.wait(k_full.index(stage), phase)
            logits = warpgroup_mma(left, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            d_weights = warpgroup_mma(grads, values.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            logits, d_weights = warpgroup_mma_wait(0, deps=[logits, d_weights])
            mbarrier.arrive(v_empty.index(stage), count=1)
            weights = _weights(logits, known, scale, addend, HAS_BIAS)
            if unmasked <= 0:
                allowed = allowed_of(
                    mine, places, firsts, seen, 0, last, rank, key_length, SCORES, CAUSAL, HAS_SINCE, BLOCK, 64
                )
                weights = gl.where(allowed, weights, 0.0)
            d_logits = weights * (d_weights - shift[:, None])
            if HAS_BIAS:
                _keep_bias(d_logits, own, places, seen, 0, BLOCK)
            packed = gl.convert_layout(d_logits.to(DTYPE), LEFT)
            for step in range(1, unmasked):  # full blocks
                before = stage
                count += 1
                stage = count % STAGES
                phase = (count // STAGES) & 1
                if HAS_BIAS:
                    addend = bias_of(biases, places, seen, step, column, BLOCK, 64)
                mbarrier.wait(k_full.index(stage), phase)
                logits = warpgroup_mma(left, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                d_weights = warpgroup_mma(
                    grads, values.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                acc = warpgroup_mma(packed, keys.index(before), acc, is_async=True)
                logits = warpgroup_mma_wait(2, deps=[logits])
                weights = _weights(logits, known, scale, addend, HAS_BIAS)
                d_weights = warpgroup_mma_wait(1, deps=[d_weights])
                mbarrier.arrive(v_empty.index(stage), count=1)
                d_logits = weights * (d_weights - shift[:, None])
                acc, packed = warpgroup_mma_wait(0, deps=[acc, packed])
                mbarrier.arrive(k_empty.index(before), count=1)
                if HAS_BIAS:
                    _keep_bias(d_logits, own, places, seen, step, BLOCK)
                packed = gl.convert_layout(d_logits.to(DTYPE), LEFT)
            for step in range(gl.maximum(unmasked, 1), steps):  # partial blocks
                before = stage
                count += 1
                stage = count % STAGES
                phase = (count // STAGES) & 1
                if HAS_BIAS:
                    addend = bias_of(biases, places, seen, step, column, BLOCK, 64)
                mbarrier.wait(k_full.index(stage), phase)
                logits = warpgroup_mma(left, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                d_weights = warpgroup_mma(
                    grads, values.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                acc = warpgroup_mma(packed, keys.index(before), acc, is_async=True)
                acc, packed, logits, d_weights = warpgroup_mma_wait(0, deps=[acc, packed, logits, d_weights])
                mbarrier.arrive(v_empty.index(stage), count=1)
                mbarrier.arrive(k_empty.index(before), count=1)
                allowed = allowed_of(
                    mine, places, firsts, seen, step, last, rank, key_length, SCORES, CAUSAL, HAS_SINCE, BLOCK, 64
                )
                weights = gl.where(allowed, _weights(logits, known, scale, addend, HAS_BIAS), 0.0)
                d_logits = weights * (d_weights - shift[:, None])
                if HAS_BIAS:
                    _keep_bias(d_logits, own, places, seen, step, BLOCK)
                packed = gl.convert_layout(d_logits.to(DTYPE), LEFT)
            mbarrier.arrive(q_empty, count=1)
            acc = warpgroup_mma(packed, keys.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(k_empty.index(stage), count=1)
            count += 1
        else:
            mbarrier.arrive(q_empty, count=1)
        row = position - query_offset
        exists = (row >= 0) & (row < query_length)
        target = (batch * HEADS + head_group * EACH + index % EACH).to(gl.int64) * query_length + row
        target = gl.convert_layout(target, gl.SliceLayout(1, SUMS))
        exists = gl.convert_layout(exists, gl.SliceLayout(1, SUMS))
        dim = gl.arange(0, DIM, gl.SliceLayout(0, SUMS))
        gl.store(
            d_q + target[:, None] * REAL_DIM + dim[None, :], (acc * softmax_scale).to(DTYPE),
            mask=exists[:, None] & (dim < REAL_DIM)[None, :],
        )  # fmt: skip


_SIZES = ["num_tiles", "width", "groups", "first_group", "query_offset", "query_length", "key_length", "length"]


@gluon.jit(do_not_specialize=_SIZES)
def backward_q(
    q_desc, o_desc, k_desc, v_desc, blocks, slots, num_full, num_seen, turns, bias, since, lse2, delta, d_q, d_bias,
    scale, softmax_scale,
    num_tiles, width, groups, first_group, query_offset, query_length, key_length, length,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr,
    GROUP: gl.constexpr, TILES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    DIM: gl.constexpr, REAL_DIM: gl.constexpr, CAUSAL: gl.constexpr, KEY_STRIDE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SINCE: gl.constexpr, IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Gradients of queries, and of the bias as `(batch, head groups, groups, TILES x CONSUMERS, width)` of zeros.

    `lse2` and `delta` are :func:`rowsums`'; `scale` is in base 2, `softmax_scale` the caller's.
    """
    PARTS: gl.constexpr = DIM // 64
    BOXES: gl.constexpr = 64 // BLOCK if BLOCK < 64 else 1
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_buf = gl.allocate_shared_memory(DTYPE, [CONSUMERS * PARTS, 1, 64 // EACH, EACH, 64], TILE)
    o_buf = gl.allocate_shared_memory(DTYPE, [CONSUMERS * PARTS, 1, 64 // EACH, EACH, 64], TILE)
    k_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS * BOXES, 1, 1, 64 // BOXES, 64], TILE)
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS * BOXES, 1, 1, 64 // BOXES, 64], TILE)
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
                    q_buf, o_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, slots, num_full, num_seen, turns, bias, since, lse2, delta, d_q, d_bias, scale,
                    softmax_scale,
                    num_tiles, width, groups, first_group, query_offset, query_length, key_length, length,
                    0, LISTS, HEAD_GROUPS, HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, STAGES, DIM, REAL_DIM, CAUSAL,
                    KEY_STRIDE, HAS_BIAS, HAS_SINCE, IN_REGISTERS)),
                (_consumer, (
                    q_buf, o_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, slots, num_full, num_seen, turns, bias, since, lse2, delta, d_q, d_bias, scale,
                    softmax_scale,
                    num_tiles, width, groups, first_group, query_offset, query_length, key_length, length,
                    1, LISTS, HEAD_GROUPS, HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, STAGES, DIM, REAL_DIM, CAUSAL,
                    KEY_STRIDE, HAS_BIAS, HAS_SINCE, IN_REGISTERS)),
                (_producer, (
                    q_desc, o_desc, k_desc, v_desc, q_buf, o_buf, k_buf, v_buf,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, num_full, num_seen, turns, num_tiles, width, groups, first_group, query_offset,
                    LISTS, HEAD_GROUPS, KV_HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, STAGES, DIM)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    q_buf, o_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, slots, num_full, num_seen, turns, bias, since, lse2, delta, d_q, d_bias, scale,
                    softmax_scale,
                    num_tiles, width, groups, first_group, query_offset, query_length, key_length, length,
                    0, LISTS, HEAD_GROUPS, HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, STAGES, DIM, REAL_DIM, CAUSAL,
                    KEY_STRIDE, HAS_BIAS, HAS_SINCE, IN_REGISTERS)),
                (_producer, (
                    q_desc, o_desc, k_desc, v_desc, q_buf, o_buf, k_buf, v_buf,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    blocks, num_full, num_seen, turns, num_tiles, width, groups, first_group, query_offset,
                    LISTS, HEAD_GROUPS, KV_HEADS, EACH, GROUP, TILES, CONSUMERS, BLOCK, STAGES, DIM)),
            ],
            [1], [24],
        )  # fmt: skip
