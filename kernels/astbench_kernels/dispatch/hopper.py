"""Which calls the Hopper kernels serve, and where `backend=auto` takes them: once they ran, and where they were timed.

The figures are of a prototype of these kernels, on one H200 (torch 2.11, triton 3.6.0): 32,768 tokens, 16 heads,
bfloat16, density 1/8, random lists, both directions. The kernels as they are here have not run on a device yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astbench_kernels.dispatch.rules import Shapes

RAN_ON_A_DEVICE = False
"""Whether `python -m astbench.bench.hopper` passed on a device. Until then nothing takes them but `triton_hopper`: the
check before their first call finds wrong numbers, but a kernel that never ends would never get to it."""

CAPABILITY = 90
"""They are written in instructions of compute capability 9.0, which neither older nor newer devices have."""

ROWS = 64
"""Query rows of a warpgroup: a list's rows must be a multiple of it."""

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128

TIMED: dict[tuple[int, int, int], tuple[float, float]] = {
    (128, 64, 128): (1.17, 1.10),
    (64, 64, 128): (1.23, 1.19),
    (128, 128, 128): (1.08, 1.12),
    (128, 32, 128): (1.10, 1.60),
    (128, 16, 128): (1.15, 2.61),
    (128, 64, 64): (1.35, 1.15),
    (64, 64, 64): (1.26, 1.16),
}
"""(query rows of a tile, block size, head size): the prototype's R forward, and with backward.

R = time / (density x time of cuDNN's dense attention in the same run). Causal, the first two gave 1.21 and 1.26, 1.33
and 1.32 against causal dense.
"""

PLAIN_TIMED = (1.8, 3.5)
"""R of the other Triton kernels on that card, blocks of 64, heads of 128, 128 rows a list, forward and with backward:
every figure of TIMED is below. They were not timed at other shapes."""


def refusals(
    *,
    capability: int,
    dtype: str,
    head_dim: int,
    value_dim: int,
    block_size: int,
    rows: int,
    heads_per_list: int,
    padded: bool,
) -> list[str]:
    """Every reason why the Hopper kernels cannot serve a call.

    Args:
        capability: Compute capability, 90 for 9.0.
        dtype: Of the inputs.
        head_dim: Of queries and keys.
        value_dim: Of values.
        block_size: Keys a block.
        rows: Query rows that share a list and its keys.
        heads_per_list: Query heads that do.
        padded: Whether keys may be padding (`key_valid`).
    """
    reasons = []
    if capability != CAPABILITY:
        reasons.append(f"compute capability is {capability / 10:.1f}, not {CAPABILITY / 10:.1f}")
    if dtype not in ("float16", "bfloat16"):
        reasons.append(f"dtype is {dtype}, not float16 or bfloat16")
    if head_dim != value_dim:
        reasons.append(f"heads of queries and values differ, {head_dim} and {value_dim}")
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        reasons.append(f"head size {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
    if block_size not in BLOCK_SIZES:
        reasons.append(f"block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if rows % ROWS:
        reasons.append(f"{rows} query rows share a list, not a multiple of {ROWS} (query_group x heads that share it)")
    if heads_per_list > ROWS or heads_per_list & (heads_per_list - 1):
        reasons.append(f"{heads_per_list} query heads share a list and its keys, not a power of two up to {ROWS}")
    if padded:
        reasons.append("there is padding (key_valid)")
    return reasons


def tile_rows(rows: int) -> int:
    """Query rows of a tile: two warpgroups where they fill it."""
    return 2 * ROWS if rows % (2 * ROWS) == 0 else ROWS


def is_default(rows: int, block_size: int, head_dim: int, *, carried: bool) -> bool:
    """Whether "auto" and "triton" take them: they ran, and were faster at such shapes; carried lists were not timed."""
    return RAN_ON_A_DEVICE and not carried and (tile_rows(rows), block_size, head_dim) in TIMED


def is_taken(shapes: Shapes) -> bool:
    """What "auto" does with such a call, if it has neither padding nor carried lists."""
    unserved = refusals(
        capability=shapes.capability,
        dtype=shapes.dtype,
        head_dim=shapes.head_dim,
        value_dim=shapes.head_dim,
        block_size=shapes.block_size,
        rows=shapes.rows,
        heads_per_list=shapes.heads // max(shapes.list_heads, shapes.kv_heads),
        padded=False,
    )
    return not unserved and is_default(shapes.rows, shapes.block_size, shapes.head_dim, carried=False)
