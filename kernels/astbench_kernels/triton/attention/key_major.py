"""Key-major kernels: one program is a key block, and walks over the query rows that chose it.

The forward one writes a partial output per (row, listed block), merged afterwards; it serves lists that few rows
share. The backward one sums over the rows in its own registers and serves every call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astbench_kernels.triton.tiles import LN2, LOG2E, load_tile, log_of_sum, matmul, rows_of_entries, store_tile

_SIZES = [
    "num_tiles", "num_blocks", "num_chunks", "groups", "width", "first_group", "query_offset", "query_length",
    "key_length",
]  # fmt: skip


@triton.jit
def _tile_in_turn(turns, tile, PARTS: tl.constexpr):
    """The part of a key block that is this program's turn: the blocks with most rows start first."""
    return tl.load(turns + tile // PARTS) * PARTS + tile % PARTS


@triton.jit
def _keys_of_program(
    tile, key_valid, key_length, HAS_VALID: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr
):
    """(block, part of the block, its keys, which of them may be seen)."""
    parts: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    part = tile % parts
    inside = part * KEYS + tl.arange(0, KEYS)
    key = (tile // parts) * BLOCK_SIZE + inside
    live = (inside < BLOCK_SIZE) & (key < key_length)
    if HAS_VALID:
        live = live & (tl.load(key_valid + key, mask=live, other=0) != 0)
    return tile // parts, part, key, live


@triton.jit
def _partial_steps(
    start, stop,
    keys, values, key_position, live, q, bias, entries, partial, partial_lse, head_group_row, part,
    stride_qh, stride_qn, scale, chunk_start, chunk_rows, width, first_group, query_offset, query_length,
    EACH: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, ROWS):
        code, head, position, row, exists = rows_of_entries(
            first, stop, entries, width, first_group, query_offset, query_length, GROUP, EACH, ROWS
        )
        queries = load_tile(q, head * stride_qh + row * stride_qn, exists, DIM, BLOCK_DIM, True)
        logits = matmul(queries, tl.trans(keys), PRECISE) * scale
        if HAS_BIAS:
            logits += (tl.load(bias + code).to(tl.float32) * LOG2E)[:, None]
        if MASKED:
            allowed = live[None, :]
            if CAUSAL:
                allowed = allowed & (key_position[None, :] <= position[:, None])
            logits = tl.where(allowed, logits, -float("inf"))
        highest = tl.max(logits, 1)
        pivot = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp2(logits - pivot[:, None])
        total = tl.sum(weights, 1)
        acc = matmul(weights.to(values.dtype), values, PRECISE) / tl.where(total > 0, total, 1.0)[:, None]
        target = (head_group_row + head) * chunk_rows + row - chunk_start
        target = (target * width + code % width) * PARTS + part
        store_tile(partial, target * VALUE_DIM, acc, exists, VALUE_DIM, BLOCK_VALUE)
        tl.store(partial_lse + target, log_of_sum(highest, total), mask=exists)


@triton.jit(do_not_specialize=[*_SIZES, "chunk", "chunk_start", "chunk_rows"])
def forward(
    q, k, v, bias, key_valid, entries, starts, turns, partial, partial_lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, chunk, chunk_start, chunk_rows,
    num_tiles, num_blocks, num_chunks, groups, width, first_group, query_offset, query_length, key_length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Partial outputs `(batch, heads, chunk_rows, width, parts, VALUE_DIM)` of one chunk of groups, lse in base 2."""
    each: tl.constexpr = HEADS // HEAD_GROUPS
    parts: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    head_group, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    batch, head_group = (head_group // HEAD_GROUPS).to(tl.int64), (head_group % HEAD_GROUPS).to(tl.int64)
    kv_head = head_group * KV_HEADS // HEAD_GROUPS
    tile = _tile_in_turn(turns + (batch * KV_HEADS + kv_head) * num_blocks, tile, parts)
    unit = batch * LISTS + head_group * LISTS // HEAD_GROUPS
    starts += unit * (num_blocks * 2 * num_chunks + 1)
    cell = (tile // parts) * 2 * num_chunks + chunk
    full_start, full_stop = tl.load(starts + cell), tl.load(starts + cell + 1)
    cell += num_chunks
    partial_start, partial_stop = tl.load(starts + cell), tl.load(starts + cell + 1)
    if full_start < full_stop or partial_start < partial_stop:
        entries += unit * groups * width
        bias += unit * groups * width
        key_valid += batch * key_length
        _block, part, key, live = _keys_of_program(tile, key_valid, key_length, HAS_VALID, BLOCK_SIZE, KEYS)
        key_position = key * KEY_STRIDE + (KEY_STRIDE - 1)
        source = key.to(tl.int64)
        k += batch * stride_kb + kv_head * stride_kh
        v += batch * stride_vb + kv_head * stride_vh
        keys = load_tile(k, source * stride_kn, live, DIM, BLOCK_DIM, True)
        values = load_tile(v, source * stride_vn, live, VALUE_DIM, BLOCK_VALUE, True)
        q += batch * stride_qb + head_group * each * stride_qh
        head_group_row = batch * HEADS + head_group * each
        size: tl.constexpr = GROUP * each
        _partial_steps(
            full_start * size, full_stop * size,
            keys, values, key_position, live, q, bias, entries, partial, partial_lse, head_group_row, part,
            stride_qh, stride_qn, scale, chunk_start, chunk_rows, width, first_group, query_offset, query_length,
            each, parts, CAUSAL, HAS_BIAS, False, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, GROUP, ROWS, PRECISE,
        )  # fmt: skip
        _partial_steps(
            partial_start * size, partial_stop * size,
            keys, values, key_position, live, q, bias, entries, partial, partial_lse, head_group_row, part,
            stride_qh, stride_qn, scale, chunk_start, chunk_rows, width, first_group, query_offset, query_length,
            each, parts, CAUSAL, HAS_BIAS, True, DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, GROUP, ROWS, PRECISE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tiles", "chunk_start", "chunk_rows", "groups", "width", "first_group",
                               "query_offset", "query_length"])  # fmt: skip
def merge(
    partial, partial_lse, counts, out, lse,
    num_tiles, chunk_start, chunk_rows, groups, width, first_group, query_offset, query_length,
    HEADS: tl.constexpr, LISTS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program is a few query rows of a head: their partial outputs weighed by the log-sum-exp of their logits."""
    index, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    batch, head = (index // HEADS).to(tl.int64), index % HEADS
    nth = tile * ROWS + tl.arange(0, ROWS)
    exists = nth < chunk_rows
    row = nth + chunk_start
    group = (row + query_offset) // GROUP - first_group
    listed = tl.load(counts + (batch * LISTS + head * LISTS // HEADS) * groups + group, mask=exists, other=0) * PARTS
    source = (index.to(tl.int64) * chunk_rows + nth) * width * PARTS
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for place in range(0, tl.max(listed, 0)):
        known = tl.load(partial_lse + source + place, mask=place < listed, other=-float("inf"))
        # Memory of blocks that the row does not see was never written.
        written = known > -float("inf")
        values = load_tile(partial, (source + place) * VALUE_DIM, written, VALUE_DIM, BLOCK_VALUE, True)
        higher = tl.maximum(highest, known)
        pivot = tl.where(higher == -float("inf"), 0.0, higher)
        shrink, weight = tl.exp2(highest - pivot), tl.exp2(known - pivot)
        acc = acc * shrink[:, None] + weight[:, None] * values.to(tl.float32)
        total = total * shrink + weight
        highest = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = index.to(tl.int64) * query_length + row
    store_tile(out, target * VALUE_DIM, acc, exists, VALUE_DIM, BLOCK_VALUE)
    tl.store(lse + target, log_of_sum(highest, total) * LN2, mask=exists)


@triton.jit
def _backward_steps(
    d_k, d_v, start, stop,
    keys, values, key_position, live, q, d_out, lse, delta, bias, since, d_q, d_bias, entries,
    stride_qh, stride_qn, stride_oh, stride_on, scale, softmax_scale,
    width, first_group, query_offset, query_length,
    EACH: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr,
    ALL: tl.constexpr, MASKED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, ROWS):
        code, head, position, row, exists = rows_of_entries(
            first, stop, entries, width, first_group, query_offset, query_length, GROUP, EACH, ROWS
        )
        queries = load_tile(q, head * stride_qh + row * stride_qn, exists, DIM, BLOCK_DIM, True)
        d_rows = load_tile(d_out, head * stride_oh + row * stride_on, exists, VALUE_DIM, BLOCK_VALUE, True)
        source = (head * query_length + row).to(tl.int32)  # make_plan sees to it that these fit
        known = tl.load(lse + source, mask=exists, other=-float("inf"))
        known = tl.where(known == -float("inf"), float("inf"), known * LOG2E)
        shift = tl.load(delta + source, mask=exists, other=0.0)
        logits = matmul(keys, tl.trans(queries), PRECISE) * scale  # (keys, rows)
        if HAS_BIAS:
            logits += (tl.load(bias + code).to(tl.float32) * LOG2E)[None, :]
        weights = tl.exp2(logits - known[None, :])
        if MASKED:
            allowed = live[:, None]
            if CAUSAL:
                allowed = allowed & (key_position[:, None] <= position[None, :])
            if HAS_SINCE:
                allowed = allowed & (position % GROUP >= tl.load(since + code))[None, :]
            weights = tl.where(allowed, weights, 0.0)
        d_v += matmul(weights.to(d_rows.dtype), d_rows, PRECISE)
        d_logits = weights * (matmul(values, tl.trans(d_rows), PRECISE) - shift[None, :])
        rounded = d_logits.to(queries.dtype)
        d_k += matmul(rounded, queries, PRECISE)
        if ALL:
            if HAS_BIAS:
                tl.atomic_add(d_bias + code, tl.sum(d_logits, 0), mask=exists, sem="relaxed")
            column = tl.arange(0, BLOCK_DIM)
            tl.atomic_add(
                d_q + source[:, None] * DIM + column[None, :],
                matmul(tl.trans(rounded), keys, PRECISE) * softmax_scale,
                mask=exists[:, None] & (column < DIM)[None, :],
                sem="relaxed",
            )
    return d_k, d_v


@triton.jit(do_not_specialize=_SIZES)
def backward(
    q, k, v, bias, since, key_valid, entries, starts, turns, d_out, lse, delta, d_q, d_k, d_v, d_bias,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    scale, softmax_scale,
    num_tiles, num_blocks, num_chunks, groups, width, first_group, query_offset, query_length, key_length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, HEAD_GROUPS: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINCE: tl.constexpr,
    HAS_VALID: tl.constexpr, ALL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; with ALL also of queries and block_bias, added to float32 buffers of zeros.

    A program owns its keys for every head_group of the KV head, so nothing but ALL's additions meets another program.
    """
    each: tl.constexpr = HEADS // HEAD_GROUPS
    head_groups: tl.constexpr = HEAD_GROUPS // KV_HEADS
    size: tl.constexpr = GROUP * each
    kv_head, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    batch, kv_head = (kv_head // KV_HEADS).to(tl.int64), (kv_head % KV_HEADS).to(tl.int64)
    tile = _tile_in_turn(turns + (batch * KV_HEADS + kv_head) * num_blocks, tile, (BLOCK_SIZE + KEYS - 1) // KEYS)
    key_valid += batch * key_length
    block, _part, key, live = _keys_of_program(tile, key_valid, key_length, HAS_VALID, BLOCK_SIZE, KEYS)
    key_position = key * KEY_STRIDE + (KEY_STRIDE - 1)
    source = key.to(tl.int64)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    keys = load_tile(k, source * stride_kn, live, DIM, BLOCK_DIM, True)
    values = load_tile(v, source * stride_vn, live, VALUE_DIM, BLOCK_VALUE, True)
    grad_k = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_VALUE], tl.float32)
    for nth in range(head_groups):
        head_group = kv_head * head_groups + nth
        unit = batch * LISTS + head_group * LISTS // HEAD_GROUPS
        cells = starts + unit * (num_blocks * 2 * num_chunks + 1) + block * 2 * num_chunks
        begin, middle, end = tl.load(cells), tl.load(cells + num_chunks), tl.load(cells + 2 * num_chunks)
        table = unit * groups * width
        first_head = batch * HEADS + head_group * each
        q_rows = q + batch * stride_qb + head_group * each * stride_qh
        o_rows = d_out + batch * stride_ob + head_group * each * stride_oh
        scalars = first_head * query_length
        grad_k, grad_v = _backward_steps(
            grad_k, grad_v, begin * size, middle * size,
            keys, values, key_position, live, q_rows, o_rows, lse + scalars, delta + scalars, bias + table,
            since + table, d_q + scalars * DIM, d_bias + table, entries + table,
            stride_qh, stride_qn, stride_oh, stride_on, scale, softmax_scale,
            width, first_group, query_offset, query_length,
            each, CAUSAL, HAS_BIAS, HAS_SINCE, ALL, False,
            DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, GROUP, ROWS, PRECISE,
        )  # fmt: skip
        grad_k, grad_v = _backward_steps(
            grad_k, grad_v, middle * size, end * size,
            keys, values, key_position, live, q_rows, o_rows, lse + scalars, delta + scalars, bias + table,
            since + table, d_q + scalars * DIM, d_bias + table, entries + table,
            stride_qh, stride_qn, stride_oh, stride_on, scale, softmax_scale,
            width, first_group, query_offset, query_length,
            each, CAUSAL, HAS_BIAS, HAS_SINCE, ALL, True,
            DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, GROUP, ROWS, PRECISE,
        )  # fmt: skip
    inside = (key - block * BLOCK_SIZE < BLOCK_SIZE) & (key < key_length)
    target = (batch * KV_HEADS + kv_head) * key_length + source
    store_tile(d_k, target * DIM, grad_k * softmax_scale, inside, DIM, BLOCK_DIM)
    store_tile(d_v, target * VALUE_DIM, grad_v, inside, VALUE_DIM, BLOCK_VALUE)


@triton.jit(do_not_specialize=["rows", "heads", "query_length"])
def rowsums(
    out, d_out, d_lse, delta, stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_ln,
    rows, heads, query_length,
    HAS_OUT: tl.constexpr, HAS_LSE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`delta = rowsum(out * d_out) - d_lse`, what the gradient of the logits subtracts from `d_out . v`."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = index < rows
    row, head, batch = index % query_length, index // query_length % heads, index // query_length // heads
    total = tl.zeros([ROWS], tl.float32)
    if HAS_OUT:
        known = load_tile(out, index * VALUE_DIM, live, VALUE_DIM, BLOCK_VALUE, True).to(tl.float32)
        offsets = batch * stride_ob + head * stride_oh + row * stride_on
        grad = load_tile(d_out, offsets, live, VALUE_DIM, BLOCK_VALUE, True).to(tl.float32)
        total += tl.sum(known * grad, 1)
    if HAS_LSE:
        total -= tl.load(d_lse + batch * stride_lb + head * stride_lh + row * stride_ln, mask=live, other=0.0)
    tl.store(delta + index, total, mask=live)
