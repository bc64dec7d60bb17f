"""Decode kernels: few query rows against long lists, which several programs share out (split-K).

One program is a tile of query rows and an even share of the keys that their list names, read straight from the
caller's lists: with so few rows, a launch that puts lists in order costs more than it saves. A second kernel weighs
what the programs of a list found. As "Flash-Decoding" (Dao, Haziza, Massa, Sizov 2023), but over chosen blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astbench_kernels.triton.tiles import LN2, LOG2E, last_key, load_keys, load_tile, log_of_sum, matmul, store_tile


@triton.jit
def _rows_of_tile(
    tile, first_group, query_offset, query_length, key_length,
    CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(head in the head group, query row, whether it exists, how many of the first keys it may see, place in group).

    A step in the middle of a group has few of the group's rows; only those that exist are counted.
    """
    group = first_group + tile // TILES_PER_GROUP
    first = tl.maximum(group * GROUP, query_offset)
    stop = tl.minimum((group + 1) * GROUP, query_offset + query_length)
    index = (tile % TILES_PER_GROUP) * ROWS + tl.arange(0, ROWS)
    position = first + index // EACH
    exists = position < stop
    visible = tl.zeros([ROWS], tl.int32) + key_length
    if CAUSAL:
        visible = tl.minimum(last_key(position, KEY_STRIDE) + 1, visible)
    return (index % EACH).to(tl.int64), (position - query_offset).to(tl.int64), exists, visible, position % GROUP


@triton.jit
def _keys_of_step(
    step, blocks, listed, limit, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """(first key, keys counted from there, their places in the list, lanes that are keys and below `limit`).

    With blocks of at least KEYS a step is a part of one block, and its place a scalar; else KEYS // PADDED blocks.
    """
    lane = tl.arange(0, KEYS)
    if PADDED >= KEYS:
        parts: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
        place = step // parts
        inside = (step % parts) * KEYS
        first = tl.load(blocks + place) * BLOCK_SIZE + inside
        key = lane
        live = (inside + lane < BLOCK_SIZE) & (first + lane < limit)
    else:
        place = step * (KEYS // PADDED) + lane // PADDED
        there = place < listed
        first = 0
        key = tl.load(blocks + place, mask=there, other=0) * BLOCK_SIZE + lane % PADDED
        live = there & (lane % PADDED < BLOCK_SIZE) & (key < limit)
    return first, key, place, live


@triton.jit
def _hide(logits, key, live, visible):
    return tl.where(live[None, :] & (key[None, :] < visible[:, None]), logits, -float("inf"))


@triton.jit(do_not_specialize=["splits", "groups", "width", "first_group", "query_offset", "query_length",
                               "key_length"])  # fmt: skip
def forward(
    q, k, v, bias, since, key_valid, indices, counts, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, splits, groups, width, first_group, query_offset, query_length, key_length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr,
    HAS_VALID: tl.constexpr, WHOLE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Writes `out` `(batch, heads, query_length, splits, VALUE_DIM)` and `lse` without the last axis, contiguous.

    The log is in base 2, except with WHOLE: then there is one split, and this is what the caller gets.
    """
    each: tl.constexpr = HEADS // HEAD_GROUPS
    split, unit = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, head_group = unit % (groups * TILES_PER_GROUP), unit // (groups * TILES_PER_GROUP)
    batch, head_group = (head_group // HEAD_GROUPS).to(tl.int64), (head_group % HEAD_GROUPS).to(tl.int64)
    kv_head = head_group * KV_HEADS // HEAD_GROUPS
    listing = (batch * LISTS + head_group * LISTS // HEAD_GROUPS) * groups + tile // TILES_PER_GROUP
    head, row, exists, visible, rank = _rows_of_tile(
        tile,
        first_group,
        query_offset,
        query_length,
        key_length,
        CAUSAL,
        KEY_STRIDE,
        GROUP,
        each,
        TILES_PER_GROUP,
        ROWS,
    )
    head = head_group * each + head
    queries = load_tile(q + batch * stride_qb, head * stride_qh + row * stride_qn, exists, DIM, BLOCK_DIM, True)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    indices += listing * width
    bias += listing * width
    since += listing * width
    key_valid += batch * key_length
    # Keys from `limit` on are seen by no row and never read, keys before `common` are seen by each.
    limit = tl.max(tl.where(exists, visible, 0), 0)
    common = tl.min(tl.where(exists, visible, key_length), 0)
    latest = tl.max(tl.where(exists, rank, 0), 0)

    listed = tl.load(counts + listing)
    if PADDED >= KEYS:
        steps = listed * ((BLOCK_SIZE + KEYS - 1) // KEYS)
    else:
        steps = tl.cdiv(listed, KEYS // PADDED)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(split * steps // splits, (split + 1) * steps // splits):
        first, key, place, live = _keys_of_step(step, indices, listed, limit, BLOCK_SIZE, PADDED, KEYS)
        if HAS_VALID:
            live = live & (tl.load(key_valid + first + key, mask=live, other=0) != 0)
        if HAS_SINCE:
            if PADDED >= KEYS:
                begin = tl.load(since + place)
                early = (rank < begin)[:, None]
            else:
                begin = tl.load(since + place, mask=place < listed, other=0)
                early = rank[:, None] < begin[None, :]
            live = live & (begin <= latest)
        keys = load_keys(k, first, key, stride_kn, live, DIM, BLOCK_DIM, True, PADDED >= KEYS)
        logits = matmul(queries, tl.trans(keys), PRECISE) * scale
        if HAS_BIAS:
            if PADDED >= KEYS:
                logits += tl.load(bias + place).to(tl.float32) * LOG2E
            else:
                addend = tl.load(bias + place, mask=place < listed, other=0.0).to(tl.float32)
                logits += (addend * LOG2E)[None, :]
        if BLOCK_SIZE % KEYS == 0 and not HAS_VALID:
            if first + KEYS > common:
                logits = _hide(logits, first + key, live, visible)
        else:
            logits = _hide(logits, first + key, live, visible)
        if HAS_SINCE:
            logits = tl.where(early, -float("inf"), logits)
        higher = tl.maximum(highest, tl.max(logits, 1))
        # Rows that have seen nothing yet: -inf - 0 and not -inf - -inf.
        pivot = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(highest - pivot)
        total = total * shrink + tl.sum(weights, 1)
        values = load_keys(v, first, key, stride_vn, live, VALUE_DIM, BLOCK_VALUE, True, PADDED >= KEYS)
        acc = acc * shrink[:, None] + matmul(weights.to(values.dtype), values, PRECISE)
        highest = higher
    # Rows that see nothing have total 0: their output is 0 / 1, their log-sum-exp -inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    log = log_of_sum(highest, total)
    if WHOLE:
        log *= LN2
    target = ((batch * HEADS + head) * query_length + row) * splits + split
    store_tile(out, target * VALUE_DIM, acc, exists, VALUE_DIM, BLOCK_VALUE)
    tl.store(lse + target, log, mask=exists)


@triton.jit(do_not_specialize=["splits"])
def merge(
    partial, partial_lse, out, lse, splits,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, MAX_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program is one query row of a head: its splits weighed by the log-sum-exp of their logits, ROWS at a time."""
    target = tl.program_id(0).to(tl.int64)
    partial_lse += target * splits
    every = tl.arange(0, MAX_SPLITS)
    logs = tl.load(partial_lse + every, mask=every < splits, other=-float("inf"))
    highest = tl.max(logs, 0)
    pivot = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(tl.exp2(logs - pivot), 0)
    acc = tl.zeros([BLOCK_VALUE], tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        there = split < splits
        weight = tl.exp2(tl.load(partial_lse + split, mask=there, other=-float("inf")) - pivot)
        values = load_tile(partial, (target * splits + split) * VALUE_DIM, there, VALUE_DIM, BLOCK_VALUE, True)
        acc += tl.sum(weight[:, None] * values, 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    column = tl.arange(0, BLOCK_VALUE)
    tl.store(out + target * VALUE_DIM + column, acc.to(out.dtype.element_ty), mask=column < VALUE_DIM)
    tl.store(lse + target, log_of_sum(highest, total) * LN2)
