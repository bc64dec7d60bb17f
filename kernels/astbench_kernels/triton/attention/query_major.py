"""Query-major kernels: one program is a tile of query rows that share a list, and reads that list block by block.

Online softmax in base 2. The first loop goes over full blocks and holds no masking code, the second over the rest.
Blocks smaller than a tile are read several at a time, larger ones in parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astbench_kernels.triton.tiles import (
    LN2,
    LOG2E,
    last_key,
    load_keys,
    load_tile,
    log_of_sum,
    matmul,
    rows_of_group,
    store_tile,
)

_SIZES = ["num_tiles", "groups", "width", "first_group", "query_offset", "query_length", "key_length"]


@triton.jit
def _tile_of_program(
    turns, num_tiles, groups, LISTS: tl.constexpr, HEAD_GROUPS: tl.constexpr, TILES_PER_GROUP: tl.constexpr
):
    """(batch, head group, list, group, tile in the group), int64 but the last; the longest lists start first."""
    head_group, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    batch, head_group = (head_group // HEAD_GROUPS).to(tl.int64), (head_group % HEAD_GROUPS).to(tl.int64)
    unit = (batch * LISTS + head_group * LISTS // HEAD_GROUPS) * groups
    group = tl.load(turns + unit + tile // TILES_PER_GROUP)
    return batch, head_group, unit + group, group, tile % TILES_PER_GROUP


@triton.jit
def _keys_of_step(step, blocks, slots, seen, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr):
    """One step through a list: (first key, keys counted from there, caller's slots, lanes that are keys).

    With blocks of at least KEYS a step is a part of one block: the slot is a scalar, and of the addresses only the
    first key changes, which saves registers. Else it is KEYS // PADDED blocks, with a slot per lane.
    """
    lane = tl.arange(0, KEYS)
    if PADDED >= KEYS:
        parts: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
        part = step % parts
        block = tl.load(blocks + step // parts)
        first = block * BLOCK_SIZE + part * KEYS
        key = lane
        slot = tl.load(slots + step // parts)
        inside = part * KEYS + lane < BLOCK_SIZE
    else:
        place = step * (KEYS // PADDED) + lane // PADDED
        block = tl.load(blocks + place, mask=place < seen, other=0)
        first = 0
        key = block * BLOCK_SIZE + lane % PADDED
        slot = tl.load(slots + place, mask=place < seen, other=0)
        inside = (place < seen) & (lane % PADDED < BLOCK_SIZE)
    return first, key, slot, inside


@triton.jit
def _live_keys(key, inside, key_valid, key_length, HAS_VALID: tl.constexpr):
    live = inside & (key < key_length)
    if HAS_VALID:
        live = live & (tl.load(key_valid + key, mask=live, other=0) != 0)
    return live


@triton.jit
def _since(since, slot, rank, ADJACENT: tl.constexpr):
    """Which rows, at these places in their group, see each key of a step by a carried list."""
    first = tl.load(since + slot)
    if ADJACENT:
        return (rank >= first)[:, None]
    return rank[:, None] >= first[None, :]


@triton.jit
def _steps(fulls, seen, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr):
    """(steps that need no mask, steps): a step that holds full and partial blocks counts as one that does."""
    if PADDED >= KEYS:
        parts: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
        return fulls * parts, seen * parts
    each: tl.constexpr = KEYS // PADDED
    return fulls // each, (seen + each - 1) // each


@triton.jit
def _forward_steps(
    acc, highest, total, start, stop,
    q, k, v, bias, since, key_valid, blocks, slots, seen, last, rank, stride_kn, stride_vn, scale, key_length,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr, HAS_VALID: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    for step in range(start, stop):
        first, key, slot, inside = _keys_of_step(step, blocks, slots, seen, BLOCK_SIZE, PADDED, KEYS)
        live = inside
        if MASKED:
            live = _live_keys(first + key, inside, key_valid, key_length, HAS_VALID)
        keys = load_keys(k, first, key, stride_kn, live, DIM, BLOCK_DIM, MASKED, PADDED >= KEYS)
        logits = matmul(q, tl.trans(keys), PRECISE) * scale
        if HAS_BIAS:
            addend = tl.load(bias + slot).to(tl.float32) * LOG2E
            if PADDED >= KEYS:
                logits += addend
            else:
                logits += addend[None, :]
        if MASKED:
            allowed = live[None, :]
            if CAUSAL:
                allowed = allowed & ((first + key)[None, :] <= last[:, None])
            if HAS_SINCE:
                allowed = allowed & _since(since, slot, rank, PADDED >= KEYS)
            logits = tl.where(allowed, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # Rows that have seen nothing yet: -inf - 0 and not -inf - -inf.
        pivot = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(highest - pivot)
        total = total * shrink + tl.sum(weights, 1)
        values = load_keys(v, first, key, stride_vn, live, VALUE_DIM, BLOCK_VALUE, MASKED, PADDED >= KEYS)
        acc = acc * shrink[:, None] + matmul(weights.to(values.dtype), values, PRECISE)
        highest = higher
    return acc, highest, total


@triton.jit(do_not_specialize=_SIZES)
def forward(
    q, k, v, bias, since, key_valid, blocks, slots, num_full, num_seen, turns, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, num_tiles, groups, width, first_group, query_offset, query_length, key_length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Writes `out` `(batch, heads, query_length, VALUE_DIM)` and `lse` (natural log), both contiguous."""
    each: tl.constexpr = HEADS // HEAD_GROUPS
    batch, head_group, unit, group, part = _tile_of_program(
        turns, num_tiles, groups, LISTS, HEAD_GROUPS, TILES_PER_GROUP
    )
    kv_head = head_group * KV_HEADS // HEAD_GROUPS
    blocks += unit * width
    slots += unit * width
    head, position, row, exists = rows_of_group(
        part * ROWS + tl.arange(0, ROWS), group, first_group, query_offset, query_length, GROUP, each
    )
    last, rank = last_key(position, KEY_STRIDE), position % GROUP
    head = head_group * each + head
    queries = load_tile(q + batch * stride_qb, head * stride_qh + row * stride_qn, exists, DIM, BLOCK_DIM, True)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    bias += unit * width
    since += unit * width
    key_valid += batch * key_length
    fulls, seen = tl.load(num_full + unit), tl.load(num_seen + unit)
    unmasked, steps = _steps(fulls, seen, BLOCK_SIZE, PADDED, KEYS)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc, highest, total = _forward_steps(
        acc, highest, total, 0, unmasked,
        queries, k, v, bias, since, key_valid, blocks, slots, seen, last, rank,
        stride_kn, stride_vn, scale, key_length, CAUSAL, HAS_BIAS, HAS_SINCE, HAS_VALID, False,
        DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, BLOCK_SIZE, PADDED, KEYS, PRECISE,
    )  # fmt: skip
    acc, highest, total = _forward_steps(
        acc, highest, total, unmasked, steps,
        queries, k, v, bias, since, key_valid, blocks, slots, seen, last, rank,
        stride_kn, stride_vn, scale, key_length, CAUSAL, HAS_BIAS, HAS_SINCE, HAS_VALID, True,
        DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, BLOCK_SIZE, PADDED, KEYS, PRECISE,
    )  # fmt: skip
    # Rows that see nothing have total 0: their output is 0 / 1, their log-sum-exp -inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = (batch * HEADS + head) * query_length + row
    store_tile(out, target * VALUE_DIM, acc, exists, VALUE_DIM, BLOCK_VALUE)
    tl.store(lse + target, log_of_sum(highest, total) * LN2, mask=exists)


@triton.jit
def _backward_steps(
    d_q, start, stop,
    q, d_out, lse, delta, k, v, bias, d_bias, since, key_valid, blocks, slots, seen, last, rank,
    stride_kn, stride_vn, scale, key_length,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr, HAS_VALID: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    for step in range(start, stop):
        first, key, slot, inside = _keys_of_step(step, blocks, slots, seen, BLOCK_SIZE, PADDED, KEYS)
        live = inside
        if MASKED:
            live = _live_keys(first + key, inside, key_valid, key_length, HAS_VALID)
        keys = load_keys(k, first, key, stride_kn, live, DIM, BLOCK_DIM, MASKED, PADDED >= KEYS)
        values = load_keys(v, first, key, stride_vn, live, VALUE_DIM, BLOCK_VALUE, MASKED, PADDED >= KEYS)
        logits = matmul(q, tl.trans(keys), PRECISE) * scale
        if HAS_BIAS:
            addend = tl.load(bias + slot).to(tl.float32) * LOG2E
            if PADDED >= KEYS:
                logits += addend
            else:
                logits += addend[None, :]
        weights = tl.exp2(logits - lse[:, None])
        if MASKED:
            allowed = live[None, :]
            if CAUSAL:
                allowed = allowed & ((first + key)[None, :] <= last[:, None])
            if HAS_SINCE:
                allowed = allowed & _since(since, slot, rank, PADDED >= KEYS)
            weights = tl.where(allowed, weights, 0.0)
        d_logits = weights * (matmul(d_out, tl.trans(values), PRECISE) - delta[:, None])
        if HAS_BIAS:
            if PADDED >= KEYS:
                if BLOCK_SIZE <= KEYS:
                    tl.store(d_bias + slot, tl.sum(tl.sum(d_logits, 1), 0))
                else:  # the parts of a block follow one another in this program: the order of the sum is fixed
                    tl.atomic_add(d_bias + slot, tl.sum(tl.sum(d_logits, 1), 0), sem="relaxed")
            else:
                each: tl.constexpr = KEYS // PADDED
                per_block = tl.sum(tl.reshape(tl.sum(d_logits, 0), [each, PADDED]), 1)
                place = step * each + tl.arange(0, each)
                there = place < seen
                tl.store(d_bias + tl.load(slots + place, mask=there, other=0), per_block, mask=there)
        d_q += matmul(d_logits.to(keys.dtype), keys, PRECISE)
    return d_q


@triton.jit(do_not_specialize=_SIZES)
def backward(
    q, k, v, bias, since, key_valid, blocks, slots, num_full, num_seen, turns, d_out, lse, delta, d_q, d_bias,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    scale, softmax_scale, num_tiles, groups, width, first_group, query_offset, query_length, key_length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and of block_bias as `(batch, head groups, groups, tiles, width)`: no two share one.

    `d_bias` starts at zero; `scale` is in base 2, `softmax_scale` the caller's.
    """
    each: tl.constexpr = HEADS // HEAD_GROUPS
    batch, head_group, unit, group, part = _tile_of_program(
        turns, num_tiles, groups, LISTS, HEAD_GROUPS, TILES_PER_GROUP
    )
    kv_head = head_group * KV_HEADS // HEAD_GROUPS
    blocks += unit * width
    slots += unit * width
    head, position, row, exists = rows_of_group(
        part * ROWS + tl.arange(0, ROWS), group, first_group, query_offset, query_length, GROUP, each
    )
    last, rank = last_key(position, KEY_STRIDE), position % GROUP
    head = head_group * each + head
    queries = load_tile(q + batch * stride_qb, head * stride_qh + row * stride_qn, exists, DIM, BLOCK_DIM, True)
    d_rows = load_tile(
        d_out + batch * stride_ob, head * stride_oh + row * stride_on, exists, VALUE_DIM, BLOCK_VALUE, True
    )
    source = (batch * HEADS + head) * query_length + row
    # Rows that see nothing: exp2(x - inf) = 0.
    known = tl.load(lse + source, mask=exists, other=-float("inf"))
    known = tl.where(known == -float("inf"), float("inf"), known * LOG2E)
    shift = tl.load(delta + source, mask=exists, other=0.0)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    bias += unit * width
    since += unit * width
    d_bias += (((batch * HEAD_GROUPS + head_group) * groups + group) * TILES_PER_GROUP + part) * width
    key_valid += batch * key_length
    fulls, seen = tl.load(num_full + unit), tl.load(num_seen + unit)
    unmasked, steps = _steps(fulls, seen, BLOCK_SIZE, PADDED, KEYS)
    grad = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    grad = _backward_steps(
        grad, 0, unmasked,
        queries, d_rows, known, shift, k, v, bias, d_bias, since, key_valid, blocks, slots, seen, last, rank,
        stride_kn, stride_vn, scale, key_length, CAUSAL, HAS_BIAS, HAS_SINCE, HAS_VALID, False,
        DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, BLOCK_SIZE, PADDED, KEYS, PRECISE,
    )  # fmt: skip
    grad = _backward_steps(
        grad, unmasked, steps,
        queries, d_rows, known, shift, k, v, bias, d_bias, since, key_valid, blocks, slots, seen, last, rank,
        stride_kn, stride_vn, scale, key_length, CAUSAL, HAS_BIAS, HAS_SINCE, HAS_VALID, True,
        DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, BLOCK_SIZE, PADDED, KEYS, PRECISE,
    )  # fmt: skip
    store_tile(d_q, source * DIM, grad * softmax_scale, exists, DIM, BLOCK_DIM)
