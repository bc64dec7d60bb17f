"""Which kernel runs a call, and why: all rules and thresholds, each with where it was measured.

The backends take their thresholds from here, `explained.py` says what they come to. Shapes and densities only: nothing
here reads a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from astbench_kernels.dispatch import hopper

GatherSchedule = Literal["query_major", "key_major", "masked", "one_row", "whole_row"]

CHUNK_BYTES = 2**20
"""gather, query-major: gathered keys held at a time. Measured (docs/cpu.md, the table of changes): 0.5-2 MB is
the flat bottom of the curve on the CPUs measured."""

KEY_MAJOR_BELOW = 0.5
"""gather: query rows a list, over the keys of a block, below which the work is done key block by key block. Measured
(docs/cpu.md, "Where the two meet"): with blocks of 16 both ways cost the same at 8 rows, with blocks of 64 at
32; at one row the difference is tenfold."""

SHORTEST_TILE = 16
"""gather: query rows that a block must meet on average for that, and a key/value head must have for all its pairs to be
computed; a decoding step's few rows gather their own keys. Not measured."""


@dataclass(frozen=True)
class GatherCosts:
    """What parts of a call cost the gather backend, in pairs of the masked schedule that no list names.

    Attributes:
        query_pair: A pair, query-major, of lists that many rows share.
        query_copy: Copying a key for one row, over that.
        key_pair: A pair, key block by key block.
        key_row: A row with every block that it meets, likewise.
        key_block: A block, likewise.
        masked_pick: A listed pair, masked, beyond the others.
        masked_block: A pair, masked, with blocks of one key beyond one with large blocks.
    """

    query_pair: float
    query_copy: float
    key_pair: float
    key_row: float
    key_block: float
    masked_pick: float
    masked_block: float


LEARNING_COSTS = GatherCosts(0.7, 30, 0.5, 55, 1500, 0.7, 0.0)
"""gather, with gradients or a bias, or where torch's fused kernel does not serve. Measured (docs/cpu.md, "All pairs"),
forward and backward, heads of 64; the unit is 15 ns."""

FUSED_COSTS = GatherCosts(0.9, 45, 1.0, 60, 4000, 0.0, 1.4)
"""gather, where torch's fused kernel computes the output and no backward pass follows. Measured (docs/cpu.md, "Fused"),
heads of 64; the unit is 3.5 ns in float32 and 1.9 ns in bfloat16."""

CHUNK_PAIRS = 2**18
"""gather, masked: pairs of queries with all keys that are computed at a time. Measured (docs/cpu.md, "All
pairs"): half of it and twice as many are slower by up to a fifth."""

SLAB_ROWS, SLAB_PAIRS = 128, 2**21
"""gather, masked by torch's fused kernel: query rows of a list, and pairs of all lists, that are computed at a time.
Measured (docs/cpu.md, "Fused"): 64 and 512 rows are slower, so are fewer pairs."""

ROW_BYTES = 2**23
"""gather, one row: gathered keys held at a time. Measured (docs/cpu.md, "One row"): the larger, the
faster, up to 16 MB."""

WHOLE_ROW, WHOLE_ROW_OF_SEVERAL = 0.4, 0.65
"""gather, one row: keys that all lists gather, over the keys of all key/value heads, from which on the cache is read
whole; with one list a key/value head, and with several, which then read a key once. Measured (docs/cpu.md, "One row"):
both ways cost the same at 0.4; with several at 0.5 to 0.6 in float32, at 0.7 to 1.0 in bfloat16."""

FUSED_BYTES = 2**22
"""gather, query-major by torch's fused kernel: gathered keys held at a time, with as much again of values and of their
mask. Measured (docs/cpu.md, "Fused"): of 256 KB to 8 MB the fastest."""

MIN_ROWS_PER_LIST = 16
"""triton: fewer rows than this cannot fill the smallest matrix instruction: they are gathered around their key
blocks. Not measured; it follows from the instruction."""

DECODE_ROWS = 128
"""triton: most query rows of the heads that share a list and its keys for the decode schedule. Not measured."""

DECODE_TILE_ROWS, DECODE_TILE_ROWS_FLOAT32 = 32, 16
"""triton, decode: most query rows of a program. Not measured; 64 rows of head size 128 do not fit in registers."""

PROGRAMS_PER_PROCESSOR = 2
"""triton, decode: programs that one multiprocessor is given before lists are no longer split. Not measured: at head
size 128 an A100 has shared memory for two, an H100 for three."""

ASSUMED_PROCESSORS = 132
"""triton: multiprocessors of an H100, where there is no device to ask."""

PARTIAL_BYTES = 64 * 2**20
"""triton, key-major: partial outputs of the forward pass held at a time. Not measured: L2 of an H100 is 50 MB."""

TRITON_MAX_HEAD_DIM = 256
"""triton: the largest head size of its kernels. Not measured; chosen so that tiles fit in registers."""

TRITON_DTYPES = ("float16", "bfloat16", "float32")
"""triton: what its kernels compute in."""


@dataclass(frozen=True)
class Shapes:
    """A call without its tensors.

    Attributes:
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16", "float16" or "float64".
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads.
        list_heads: Heads with lists of their own: 1, `kv_heads` or `heads`.
        head_dim: The larger head size.
        query_length: Queries.
        key_length: Keys.
        block_size: Keys a block.
        query_group: Queries a list.
        density: Share of the visible blocks that is listed.
        causal: Whether under a causal mask, the last query at the last key.
        capability: Of a CUDA device, 90 for 9.0; 0 where it is not known.
        gradients: Whether a backward pass may follow.
    """

    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    list_heads: int
    head_dim: int
    query_length: int
    key_length: int
    block_size: int
    query_group: int
    density: float
    causal: bool
    capability: int = 0
    gradients: bool = False

    @property
    def rows(self) -> int:
        """Query rows that share a list and its keys."""
        return rows_per_list(self.heads, self.kv_heads, self.list_heads, self.query_group)

    @property
    def decodes(self) -> bool:
        """Whether it is a decoding step to the Triton kernels, on a device of ASSUMED_PROCESSORS."""
        lists = max(self.list_heads, self.kv_heads)
        together = self.heads // lists
        tile = DECODE_TILE_ROWS_FLOAT32 if self.dtype == "float32" else DECODE_TILE_ROWS
        groups = math.ceil(self.query_length / self.query_group)
        tiles = groups * math.ceil(min(self.query_group, self.query_length) * together / tile)
        units = self.batch * lists
        return is_decode(self.query_length * together, units * tiles, units, ASSUMED_PROCESSORS)

    @property
    def keys_seen(self) -> float:
        """Keys that a query position sees, on average."""
        return keys_seen(self.query_length, self.key_length, self.key_length - self.query_length, causal=self.causal)

    @property
    def rows_met(self) -> float:
        """Query rows that a key block meets, on average over the blocks."""
        blocks = math.ceil(self.key_length / self.block_size)
        visible = float(blocks)
        if self.causal:
            first = max(0, self.key_length - self.query_length)
            visible = (math.ceil((first + 1) / self.block_size) + blocks) / 2
        lists = max(self.list_heads, self.kv_heads) * math.ceil(self.query_length / self.query_group)
        return lists * visible * self.density * self.rows / (self.kv_heads * blocks)


@dataclass(frozen=True)
class Row:
    """One line of the dispatch table: what `backend=auto` runs, and when.

    Attributes:
        backend: A name from :func:`astbench_kernels.backends`.
        schedule: "query_major", "key_major", "masked", "one_row", "whole_row", "decode" or "hopper".
        when: The condition in words.
        holds: The condition.
        why: What speaks for it.
        measured: Where its threshold was measured; "not measured" where it was not.
    """

    backend: str
    schedule: str
    when: str
    holds: Callable[[Shapes], bool]
    why: str
    measured: str

    @property
    def runs(self) -> str:
        """Backend and schedule in words, as statistics and records hold them."""
        return named(self.backend, self.schedule)


def named(backend: str, schedule: str) -> str:
    """Backend and schedule in words."""
    return f"{backend} ({schedule.replace('_', '-')})"


def rows_per_list(heads: int, kv_heads: int, list_heads: int, query_group: int) -> int:
    """Query rows that share a list and its keys."""
    return heads // max(list_heads, kv_heads) * query_group


def keys_seen(query_length: int, key_length: int, query_offset: int, *, causal: bool, key_stride: int = 1) -> float:
    """Keys that a query position sees, on average; arguments as in :class:`astbench_kernels.BlockLayout`."""
    if not causal:
        return float(key_length)
    first, last = ((query_offset + n) / key_stride for n in (1, query_length))

    def below(end: float) -> float:
        """Integral of the keys seen, up to an end that grows evenly."""
        inside = min(max(end, 0.0), key_length)
        return inside**2 / 2 + key_length * max(0.0, end - key_length)

    return (below(last) - below(first)) / (last - first) if last > first else min(max(first, 0.0), key_length)


def gather_schedule(
    rows: int, block_size: int, rows_met: float, query_rows: int, key_length: int, seen: float, *, fused: bool
) -> GatherSchedule:
    """How the gather backend goes about a call.

    Args:
        rows: Query rows that share a list and its keys.
        block_size: Keys a block.
        rows_met: Query rows that a block meets, on average over the blocks.
        query_rows: Query rows of a key/value head.
        key_length: Keys.
        seen: Keys that a query position sees, on average.
        fused: Whether torch's fused kernel computes the output, and no backward pass follows.
    """
    cost = FUSED_COSTS if fused else LEARNING_COSTS
    by_key = rows < KEY_MAJOR_BELOW * block_size and rows_met >= SHORTEST_TILE
    if by_key:
        some = rows_met * (cost.key_pair * block_size + cost.key_row) + cost.key_block
    else:
        some = rows_met * block_size * cost.query_pair * (1 + cost.query_copy / rows)
    # A chunk computes what its last row sees.
    beyond = SLAB_ROWS / 2 if fused else CHUNK_PAIRS / (2 * max(1.0, seen))
    all_keys = min(key_length, seen + beyond) * (1 + cost.masked_block / block_size)
    every = query_rows * all_keys * block_size / max(1, key_length) + rows_met * block_size * cost.masked_pick
    if query_rows >= SHORTEST_TILE and every < some:
        return "masked"
    return "key_major" if by_key else "query_major"


def triton_schedule(rows: int) -> Literal["query_major", "key_major"]:
    """The same for the Triton kernels."""
    return "query_major" if rows >= MIN_ROWS_PER_LIST else "key_major"


def is_decode(rows: int, tiles: int, units: int, processors: int) -> bool:
    """Whether the Triton kernels take a call without gradients as a decoding step.

    Args:
        rows: Query rows of the heads that share a list and its keys, over all groups.
        tiles: Programs that hold them, over the batch, when no list is split.
        units: Lists of one group, over the batch.
        processors: Of the device.
    """
    return rows <= DECODE_ROWS and (tiles == units or tiles < processors * PROGRAMS_PER_PROCESSOR)


def triton_refusals(shapes: Shapes) -> list[str]:
    """Every reason why "auto" does not take triton."""
    reasons = []
    if shapes.device != "cuda":
        reasons.append(f"triton needs a CUDA device, this is {shapes.device}")
    if shapes.dtype not in TRITON_DTYPES:
        reasons.append(f"triton computes in {', '.join(TRITON_DTYPES)}, not {shapes.dtype}")
    if shapes.head_dim > TRITON_MAX_HEAD_DIM:
        reasons.append(f"triton takes heads of at most {TRITON_MAX_HEAD_DIM}, not {shapes.head_dim}")
    return reasons


def row_schedule(width: int, lists: int, kv_heads: int, key_length: int) -> Literal["one_row", "whole_row"]:
    """How the gather backend goes about a decoding step: its keys are gathered, or all are read in place.

    Args:
        width: Keys of the longest list.
        lists: Lists of a batch row.
        kv_heads: Key/value heads.
        key_length: Keys.
    """
    least = WHOLE_ROW_OF_SEVERAL if lists > kv_heads else WHOLE_ROW
    return "whole_row" if width * lists >= least * kv_heads * key_length else "one_row"


def gather_of(shapes: Shapes) -> GatherSchedule:
    """:func:`gather_schedule` of a call, or :func:`row_schedule`."""
    if shapes.query_length == 1:
        lists = max(shapes.list_heads, shapes.kv_heads)
        width = math.ceil(shapes.density * math.ceil(shapes.key_length / shapes.block_size)) * shapes.block_size
        schedule = row_schedule(width, lists, shapes.kv_heads, shapes.key_length)
        return schedule if shapes.device == "cpu" else "one_row"
    groups = math.ceil(shapes.query_length / shapes.query_group)
    query_rows = groups * shapes.query_group * shapes.heads // shapes.kv_heads
    size, met = shapes.block_size, shapes.rows_met
    fused = shapes.device == "cpu" and not shapes.gradients and shapes.dtype != "float16"
    return gather_schedule(shapes.rows, size, met, query_rows, shapes.key_length, shapes.keys_seen, fused=fused)


_ON_TRITON = f"CUDA, {', '.join(TRITON_DTYPES)}, heads of at most {TRITON_MAX_HEAD_DIM}"

TABLE = (
    Row(
        "triton",
        "decode",
        f"{_ON_TRITON}; no gradients, and at most {DECODE_ROWS} query rows of the heads that share a list, in one tile "
        "or in too few to fill the device",
        lambda shapes: not triton_refusals(shapes) and shapes.decodes,
        "the programs of a list share it out and read it as it is: making other lists ready would cost more",
        "not measured",
    ),
    Row(
        "triton",
        "hopper",
        "once they passed on a device (dispatch/hopper.py; not yet): CUDA, compute capability 9.0, float16 or "
        "bfloat16, no padding, lists not carried; query rows of a list, block size and head size as in that file",
        lambda shapes: not triton_refusals(shapes) and hopper.is_taken(shapes),
        "a prototype of these kernels was faster than the other Triton kernels at such shapes",
        'docs/gpu.md, "Hopper", on a prototype; the kernels as they are here not yet',
    ),
    Row(
        "triton",
        "query_major",
        f"{_ON_TRITON}; at least {MIN_ROWS_PER_LIST} query rows share a list and its keys",
        lambda shapes: not triton_refusals(shapes) and triton_schedule(shapes.rows) == "query_major",
        "a tile of rows that share a list reads each of its key blocks once",
        "not measured",
    ),
    Row(
        "triton",
        "key_major",
        f"{_ON_TRITON}; fewer query rows share a list",
        lambda shapes: not triton_refusals(shapes),
        "each key block gathers the rows that chose it, so that few rows a list still fill matrix instructions",
        "not measured",
    ),
    Row(
        "gather",
        "one_row",
        "elsewhere; one query row, as in a decoding step",
        lambda shapes: gather_of(shapes) == "one_row",
        "its own keys are gathered; tiles of queries and blocks of keys would have to be filled up with nothing",
        'docs/cpu.md, "One row"',
    ),
    Row(
        "gather",
        "whole_row",
        f"CPU; one query row without gradients, whose lists name {WHOLE_ROW} times the keys of the cache or more, "
        f"{WHOLE_ROW_OF_SEVERAL} where query heads with lists of their own share a key/value head",
        lambda shapes: gather_of(shapes) == "whole_row",
        "gathering the keys of each list would cost more than reading all of them where they lie",
        'docs/cpu.md, "One row"',
    ),
    Row(
        "gather",
        "masked",
        f"elsewhere; at least {SHORTEST_TILE} query rows, and all pairs cost less than leaving some out",
        lambda shapes: gather_of(shapes) == "masked",
        "where sequences are short, blocks small, or most is listed, computing all pairs and picking the listed ones "
        "is faster than leaving any out",
        'docs/cpu.md, "All pairs" and "Fused"',
    ),
    Row(
        "gather",
        "key_major",
        f"elsewhere; fewer than {KEY_MAJOR_BELOW} x block_size query rows share a list, and a block meets at least "
        f"{SHORTEST_TILE} on average",
        lambda shapes: gather_of(shapes) == "key_major",
        "copying each list's own keys would cost more than the work on them",
        'docs/cpu.md, "Where the two meet"',
    ),
    Row(
        "gather",
        "query_major",
        f"elsewhere; fewer than {KEY_MAJOR_BELOW} x block_size query rows share a list, and a block meets fewer than "
        f"{SHORTEST_TILE} on average",
        lambda shapes: shapes.rows < KEY_MAJOR_BELOW * shapes.block_size,
        "the few rows that a block meets would make no tile",
        "not measured",
    ),
    Row(
        "gather",
        "query_major",
        f"elsewhere; at least {KEY_MAJOR_BELOW} x block_size query rows share a list",
        lambda shapes: True,
        "enough rows share the keys that are copied for them",
        'docs/cpu.md, "Where the two meet"',
    ),
)
"""The first row whose condition holds decides."""
