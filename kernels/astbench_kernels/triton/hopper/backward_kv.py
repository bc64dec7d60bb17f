"""Gradients of keys and values for compute capability 9.0: key-major, over transposed lists, no atomic additions.

A program is 64 keys, or one block of fewer, and one warpgroup that holds both gradients (128 registers a thread at
head size 128). The producer warp streams the query rows that chose the block, with their log-sum-exp and delta. Two
programs share a multiprocessor and fill each other's gaps.
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

from astbench_kernels.triton.hopper.pieces import NEVER, last_key


@gluon.jit
def _block_of(tile, turns, KV_HEADS: gl.constexpr, SPLIT: gl.constexpr, num_blocks):
    """(batch, key/value head, block, part of the block) of a program; the blocks with most rows start first."""
    unit = tile // (num_blocks * SPLIT)
    rest = tile % (num_blocks * SPLIT)
    return unit // KV_HEADS, unit % KV_HEADS, gl.load(turns + unit * num_blocks + rest // SPLIT), rest % SPLIT


@gluon.jit
def _producer(
    q_desc, o_desc, k_desc, v_desc, l_desc, t_desc, q_buf, o_buf, k_buf, v_buf, l_buf, t_buf,
    q_full, q_empty, o_full, o_empty, kv_full, entries, starts, turns,
    num_blocks, width, groups, first_group, query_offset,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr, GROUP: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = DIM // 64
    TILES: gl.constexpr = GROUP * EACH // 64
    SHARE: gl.constexpr = HEAD_GROUPS // KV_HEADS
    SPLIT: gl.constexpr = BLOCK // 64 if BLOCK > 64 else 1
    BOX: gl.constexpr = 64 if BLOCK > 64 else BLOCK
    batch, kv_head, block, part = _block_of(gl.program_id(0), turns, KV_HEADS, SPLIT, num_blocks)
    mbarrier.expect(kv_full, 2 * BOX * DIM * 2)
    for p in gl.static_range(PARTS):
        first = block * BLOCK + part * 64
        at = p * (64 // BOX)
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, first, p * 64], kv_full, k_buf.index(at))
        tma.async_copy_global_to_shared(v_desc, [batch, kv_head, first, p * 64], kv_full, v_buf.index(at))
    count = 0
    for nth in range(SHARE):
        head_group = kv_head * SHARE + nth
        unit = batch * LISTS + head_group * LISTS // HEAD_GROUPS
        cell = starts + unit * (2 * num_blocks + 1) + 2 * block
        mine = entries + unit.to(gl.int64) * groups * width
        for entry in range(gl.load(cell), gl.load(cell + 2)):
            group = gl.load(mine + entry) // width
            for t in gl.static_range(TILES):
                row = (first_group + group) * GROUP - query_offset + t * (64 // EACH)
                place = group * (GROUP * EACH) + t * 64
                stage = count % STAGES
                phase = (count // STAGES) & 1
                mbarrier.wait(q_empty.index(stage), phase ^ 1)
                mbarrier.expect(q_full.index(stage), 64 * DIM * 2 + 256)
                tma.async_copy_global_to_shared(
                    l_desc, [batch * HEAD_GROUPS + head_group, place], q_full.index(stage), l_buf.index(stage)
                )
                for p in gl.static_range(PARTS):
                    at = stage * PARTS + p
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, row, head_group * EACH, p * 64], q_full.index(stage), q_buf.index(at)
                    )
                mbarrier.wait(o_empty.index(stage), phase ^ 1)
                mbarrier.expect(o_full.index(stage), 64 * DIM * 2 + 256)
                tma.async_copy_global_to_shared(
                    t_desc, [batch * HEAD_GROUPS + head_group, place], o_full.index(stage), t_buf.index(stage)
                )
                for p in gl.static_range(PARTS):
                    at = stage * PARTS + p
                    tma.async_copy_global_to_shared(
                        o_desc, [batch, row, head_group * EACH, p * 64], o_full.index(stage), o_buf.index(at)
                    )
                count += 1


@gluon.jit
def _step(
    d_k, d_v, count, key, last, addend, queries, grads, keys, values, l_buf, t_buf, q_full, q_empty, o_full, o_empty,
    scale, STAGES: gl.constexpr, DIM: gl.constexpr, MASKED: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """64 query rows; everything is transposed, (keys, rows), so that no operand has to go through shared memory."""
    DTYPE: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.full([64, 64], 0.0, gl.float32, SCORES)
    stage = count % STAGES
    phase = (count // STAGES) & 1
    mbarrier.wait(q_full.index(stage), phase)
    logits = warpgroup_mma(keys, queries.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(o_full.index(stage), phase)
    d_weights = warpgroup_mma(values, grads.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    known = l_buf.index(stage).reshape([64]).load(COLUMN)
    if HAS_BIAS:
        known = known - addend
    if MASKED:
        logits, d_weights = warpgroup_mma_wait(0, deps=[logits, d_weights])
    else:
        logits = warpgroup_mma_wait(1, deps=[logits])
    weights = gl.exp2(logits * scale - known[None, :])
    if MASKED:
        weights = gl.where(key[:, None] <= last[None, :], weights, 0.0)
    packed = gl.convert_layout(weights.to(DTYPE), LEFT)
    d_v = warpgroup_mma(packed, grads.index(stage), d_v, is_async=True)
    shift = t_buf.index(stage).reshape([64]).load(COLUMN)
    if not MASKED:
        d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    rounded = gl.convert_layout((weights * (d_weights - shift[None, :])).to(DTYPE), LEFT)
    d_k = warpgroup_mma(rounded, queries.index(stage), d_k, is_async=True)
    d_v, packed = warpgroup_mma_wait(1, deps=[d_v, packed])
    mbarrier.arrive(o_empty.index(stage), count=1)
    d_k, rounded = warpgroup_mma_wait(0, deps=[d_k, rounded])
    mbarrier.arrive(q_empty.index(stage), count=1)
    return d_k, d_v


@gluon.jit
def _consumer(
    q_buf, o_buf, k_buf, v_buf, l_buf, t_buf, q_full, q_empty, o_full, o_empty, kv_full, entries, starts, turns, bias,
    since, out_k, out_v, scale, softmax_scale, num_blocks, width, groups, first_group, key_length,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr, GROUP: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr, REAL_DIM: gl.constexpr, CAUSAL: gl.constexpr,
    KEY_STRIDE: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SINCE: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_buf.dtype
    TILES: gl.constexpr = GROUP * EACH // 64
    SHARE: gl.constexpr = HEAD_GROUPS // KV_HEADS
    SPLIT: gl.constexpr = BLOCK // 64 if BLOCK > 64 else 1
    MASKS: gl.constexpr = CAUSAL or HAS_SINCE
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = k_buf._reinterpret(DTYPE, [1, 64, DIM], SHARED).index(0)
    values = v_buf._reinterpret(DTYPE, [1, 64, DIM], SHARED).index(0)
    queries = q_buf._reinterpret(DTYPE, [STAGES, 64, DIM], SHARED)
    grads = o_buf._reinterpret(DTYPE, [STAGES, 64, DIM], SHARED)
    batch, kv_head, block, part = _block_of(gl.program_id(0), turns, KV_HEADS, SPLIT, num_blocks)
    first = block * BLOCK + part * 64
    key = first + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    d_k = gl.full([64, DIM], 0.0, gl.float32, SUMS)
    d_v = gl.full([64, DIM], 0.0, gl.float32, SUMS)
    none = gl.full([64], 0, gl.int32, COLUMN)
    count = 0
    mbarrier.wait(kv_full, 0)
    for nth in range(SHARE):
        head_group = kv_head * SHARE + nth
        unit = batch * LISTS + head_group * LISTS // HEAD_GROUPS
        cell = starts + unit * (2 * num_blocks + 1) + 2 * block
        begin, middle, end = gl.load(cell), gl.load(cell + 1), gl.load(cell + 2)
        table = unit.to(gl.int64) * groups * width
        if not MASKS:  # what makes a block partial then is that keys are missing, and those are not stored
            middle = end
        for step in range(begin * TILES, middle * TILES):
            addend = 0.0
            if HAS_BIAS:
                code = gl.load(entries + table + step // TILES)
                addend = gl.load(bias + table + code).to(gl.float32) * 1.4426950408889634
            d_k, d_v = _step(
                d_k, d_v, count, key, none, addend, queries, grads, keys, values, l_buf, t_buf, q_full, q_empty, o_full,
                o_empty, scale, STAGES, DIM, False, HAS_BIAS)  # fmt: skip
            count += 1
        if MASKS:
            for step in range(middle * TILES, end * TILES):
                code = gl.load(entries + table + step // TILES)
                addend = 0.0
                if HAS_BIAS:
                    addend = gl.load(bias + table + code).to(gl.float32) * 1.4426950408889634
                rank = (step % TILES * 64 + gl.arange(0, 64, COLUMN)) // EACH
                if CAUSAL:
                    last = last_key((first_group + code // width) * GROUP + rank, KEY_STRIDE)
                else:
                    last = gl.full([64], NEVER, gl.int32, COLUMN)
                if HAS_SINCE:
                    last = gl.where(rank >= gl.load(since + table + code), last, -1)
                d_k, d_v = _step(
                    d_k, d_v, count, key, last, addend, queries, grads, keys, values, l_buf, t_buf, q_full, q_empty,
                    o_full, o_empty, scale, STAGES, DIM, True, HAS_BIAS)  # fmt: skip
                count += 1
    row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, SUMS))
    inside = (first + row < key_length) & (row < BLOCK)
    mask = inside[:, None] & (dim < REAL_DIM)[None, :]
    target = ((batch * KV_HEADS + kv_head).to(gl.int64) * key_length + first + row)[:, None] * REAL_DIM + dim[None, :]
    gl.store(out_k + target, (d_k * softmax_scale).to(DTYPE), mask=mask)
    gl.store(out_v + target, d_v.to(DTYPE), mask=mask)


@gluon.jit(do_not_specialize=["num_blocks", "width", "groups", "first_group", "query_offset", "key_length"])
def backward_kv(
    q_desc, o_desc, k_desc, v_desc, l_desc, t_desc, entries, starts, turns, bias, since, d_k, d_v,
    scale, softmax_scale, num_blocks, width, groups, first_group, query_offset, key_length,
    LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, KV_HEADS: gl.constexpr, EACH: gl.constexpr, GROUP: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr, REAL_DIM: gl.constexpr, CAUSAL: gl.constexpr,
    KEY_STRIDE: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SINCE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, contiguous. One program for 64 keys, or for a block where those are fewer."""
    PARTS: gl.constexpr = DIM // 64
    BOX: gl.constexpr = 64 if BLOCK > 64 else BLOCK
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS, 1, 64 // EACH, EACH, 64], TILE)
    o_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS, 1, 64 // EACH, EACH, 64], TILE)
    # The products read 64 rows; what lies in those that a smaller block leaves over is never stored.
    k_all = gl.allocate_shared_memory(DTYPE, [PARTS * (64 // BOX), 1, 1, BOX, 64], TILE)
    v_all = gl.allocate_shared_memory(DTYPE, [PARTS * (64 // BOX), 1, 1, BOX, 64], TILE)
    l_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], FLAT)
    t_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], FLAT)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    o_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    o_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=1)
        mbarrier.init(o_full.index(stage), count=1)
        mbarrier.init(o_empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                q_buf, o_buf, k_all, v_all, l_buf, t_buf, q_full, q_empty, o_full, o_empty, kv_full,
                entries, starts, turns, bias, since, d_k, d_v, scale, softmax_scale,
                num_blocks, width, groups, first_group, key_length,
                LISTS, HEAD_GROUPS, KV_HEADS, EACH, GROUP, BLOCK, STAGES, DIM, REAL_DIM, CAUSAL, KEY_STRIDE, HAS_BIAS,
                HAS_SINCE)),
            (_producer, (
                q_desc, o_desc, k_desc, v_desc, l_desc, t_desc, q_buf, o_buf, k_all, v_all, l_buf, t_buf,
                q_full, q_empty, o_full, o_empty, kv_full, entries, starts, turns,
                num_blocks, width, groups, first_group, query_offset,
                LISTS, HEAD_GROUPS, KV_HEADS, EACH, GROUP, BLOCK, STAGES, DIM)),
        ],
        [1], [24],
    )  # fmt: skip
