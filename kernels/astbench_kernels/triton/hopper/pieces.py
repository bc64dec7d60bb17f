"""What the Hopper kernels share: the tile of a program, the keys of a step through a list, loads by TMA.

A tile is 64 or 128 query rows of one list. A *step* is KEYS keys of that list: a part of one block, or several whole
blocks, each a *box* of its own that TMA copies. Keys lie in shared memory as tiles of (KEYS, 64), 128 bytes a row, the
widest that it swizzles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

NEVER = gl.constexpr(2147483647)
"""A key that no row sees."""


@gluon.jit
def tile_of(
    tile, turns, num_full, num_seen, groups, LISTS: gl.constexpr, HEAD_GROUPS: gl.constexpr, TILES: gl.constexpr
):
    """(batch, head group, group, part of the group, row of the table of lists, full blocks, seen blocks) of a tile."""
    head_group = tile // (groups * TILES)
    rest = tile % (groups * TILES)
    batch = head_group // HEAD_GROUPS
    head_group = head_group % HEAD_GROUPS
    unit = (batch * LISTS + head_group * LISTS // HEAD_GROUPS) * groups
    group = gl.load(turns + unit + rest // TILES)
    listed = unit + group
    return batch, head_group, group, rest % TILES, listed, gl.load(num_full + listed), gl.load(num_seen + listed)


@gluon.jit
def steps_of(full, seen, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """(steps that need no mask, steps) through a list; one that holds a partial block needs one."""
    if BLOCK >= KEYS:
        return full * (BLOCK // KEYS), seen * (BLOCK // KEYS)
    else:
        return full // (KEYS // BLOCK), (seen + (KEYS // BLOCK - 1)) // (KEYS // BLOCK)


@gluon.jit
def first_key(blocks, seen, step, box, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """First key of one box of a step. Boxes beyond the list repeat its last block; a mask hides them."""
    if BLOCK >= KEYS:
        return gl.load(blocks + step // (BLOCK // KEYS)) * BLOCK + step % (BLOCK // KEYS) * KEYS
    else:
        return gl.load(blocks + gl.minimum(step * (KEYS // BLOCK) + box, seen - 1)) * BLOCK


@gluon.jit
def keys_of(blocks, seen, step, column, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """(key of each column of a step, whether the list holds it)."""
    if BLOCK >= KEYS:
        key = first_key(blocks, seen, step, 0, BLOCK, KEYS) + column
        return key, key >= 0
    else:
        place = step * (KEYS // BLOCK) + column // BLOCK
        return gl.load(blocks + gl.minimum(place, seen - 1)) * BLOCK + column % BLOCK, place < seen


@gluon.jit
def bias_of(bias, slots, seen, step, column, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """What is added to the logits (base 2) of each column of a step."""
    if BLOCK >= KEYS:
        value = gl.load(bias + gl.load(slots + step // (BLOCK // KEYS))).to(gl.float32)
        return gl.full(column.shape, 0.0, gl.float32, column.type.layout) + value * 1.4426950408889634
    elif KEYS // BLOCK == 2:  # two scalars, not a gather
        last = seen - 1
        one = gl.load(bias + gl.load(slots + gl.minimum(step * 2, last))).to(gl.float32)
        other = gl.load(bias + gl.load(slots + gl.minimum(step * 2 + 1, last))).to(gl.float32)
        return gl.where(column < BLOCK, one, other) * 1.4426950408889634
    else:
        place = gl.minimum(step * (KEYS // BLOCK) + column // BLOCK, seen - 1)
        return gl.load(bias + gl.load(slots + place)).to(gl.float32) * 1.4426950408889634


@gluon.jit
def since_of(since, slots, seen, step, column, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """The first row of the group that sees each column of a step, by a carried list."""
    if BLOCK >= KEYS:
        value = gl.load(since + gl.load(slots + step // (BLOCK // KEYS)))
        return gl.full(column.shape, 0, gl.int32, column.type.layout) + value
    else:
        place = gl.minimum(step * (KEYS // BLOCK) + column // BLOCK, seen - 1)
        return gl.load(since + gl.load(slots + place))


@gluon.jit
def allowed_of(
    blocks, slots, since, seen, step, last, rank, key_length, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_SINCE: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Which (row, key) pairs of a step may be seen, by the last key of each row and its place (rank) in its group."""
    column = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    key, listed = keys_of(blocks, seen, step, column, BLOCK, KEYS)
    key = gl.where(listed & (key < key_length), key, NEVER)
    if CAUSAL:
        allowed = key[None, :] <= last[:, None]
    else:
        allowed = (key < NEVER)[None, :] & (last >= -1)[:, None]
    if HAS_SINCE:
        first = since_of(since, slots, seen, step, column, BLOCK, KEYS)
        allowed = allowed & (rank[:, None] >= first[None, :])
    return allowed


@gluon.jit
def last_key(position, KEY_STRIDE: gl.constexpr):
    """The last key that queries at these positions see under a causal mask, -1 where they see none."""
    if KEY_STRIDE == 1:
        return position
    else:
        return (position + 1) // KEY_STRIDE - 1


@gluon.jit
def load_keys(
    desc, barrier, buffer, place, batch, kv_head, blocks, seen, step,
    BOXES: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Start copying a step's keys (or values), PARTS tiles of (KEYS, 64): boxes of one tile lie under one another."""
    for box in gl.static_range(BOXES):
        first = first_key(blocks, seen, step, box, BLOCK, KEYS)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                desc, [batch, kv_head, first, part * 64], barrier, buffer.index(place + part * BOXES + box)
            )


@gluon.jit
def produce_keys(
    k_desc, v_desc, k_buf, v_buf, k_full, k_empty, v_full, v_empty, count, batch, kv_head, blocks, seen, steps,
    BOXES: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DIM: gl.constexpr,
):  # fmt: skip
    """All of a list's keys and values into a ring of STAGES; returns how many steps went through the ring so far.

    The n-th use of a stage waits for phase n - 1 of its `empty` barrier, which a fresh barrier counts as passed.
    """
    for step in range(steps):
        stage = count % STAGES
        phase = (count // STAGES) & 1
        place = stage * (PARTS * BOXES)
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), KEYS * DIM * 2)
        load_keys(k_desc, k_full.index(stage), k_buf, place, batch, kv_head, blocks, seen, step,
                  BOXES, PARTS, BLOCK, KEYS)  # fmt: skip
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), KEYS * DIM * 2)
        load_keys(v_desc, v_full.index(stage), v_buf, place, batch, kv_head, blocks, seen, step,
                  BOXES, PARTS, BLOCK, KEYS)  # fmt: skip
        count += 1
    return count
