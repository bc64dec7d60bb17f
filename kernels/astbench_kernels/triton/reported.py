"""The kinds of call and of choice that the kernels are shipped for, and compiled for ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from astbench_kernels.dispatch.hopper import BLOCK_SIZES, TIMED


@dataclass(frozen=True)
class ReportedCall:
    """A kind of call that the kernels are shipped for."""

    head_dim: int = 128
    block_size: int = 64
    query_group: int = 128
    heads: int = 8
    kv_heads: int = 8
    lists: int = 8
    causal: bool = True
    key_stride: int = 1
    bias: bool = True
    padding: bool = False
    dtype: str = "bfloat16"
    decode: bool = False
    one_pass: bool = False
    hopper: bool = False
    carried: bool = False


@dataclass(frozen=True)
class ReportedChoice:
    """A kind of choice that the predictor's kernels are shipped for; `rank` is what its factors add to `head_dim`.

    With `tile` the lists are carried, and a block has `columns`, of which `pool` count by their largest.
    """

    head_dim: int = 128
    rank: int = 32
    num_blocks: int = 1024
    block_size: int = 16
    query_group: int = 1
    heads: int = 8
    kv_heads: int = 8
    causal: bool = True
    padding: bool = False
    dtype: str = "bfloat16"
    tile: int = 0
    columns: int = 1
    pool: int = 1
    by_share: bool = False


SHORT = [ReportedCall(), ReportedCall(query_group=1), ReportedCall(query_group=1, kv_heads=2, lists=2, decode=True)]
"""The calls of a quick look: lists that many rows share, lists per token, and a decoding step."""


SHORT_HOPPER = [ReportedCall(hopper=True), ReportedCall(query_group=64, hopper=True, carried=True)]
"""The same for the kernels of compute capability 9.0 alone: tiles of 128 and of 64 rows."""


_INDEX = ReportedChoice(head_dim=16, rank=1, num_blocks=128, block_size=64, tile=64, columns=64, pool=16)

SHORT_CHOICES = [ReportedChoice(), ReportedChoice(num_blocks=2048), replace(_INDEX, by_share=True)]
"""The choices of a quick look: scores in registers, through the scratch, and lists carried by an index of tokens."""


def matrix() -> Iterator[ReportedCall]:
    """Every shipped combination of head size, block size and group in bfloat16, and what else changes code, once."""
    for head_dim, block_size, query_group in product((64, 96, 128), (16, 32, 64, 128), (1, 16, 64, 128)):
        yield ReportedCall(head_dim, block_size, query_group)
    for query_group in (1, 64):
        call = ReportedCall(query_group=query_group)
        yield replace(call, causal=False, bias=False)
        yield replace(call, padding=True)
        yield replace(call, key_stride=4)
        yield replace(call, kv_heads=2)
        yield replace(call, kv_heads=2, lists=2)
        yield replace(call, dtype="float16")
        yield replace(call, dtype="float32")
        yield replace(call, head_dim=16)
        yield replace(call, head_dim=32)
        yield replace(call, head_dim=256)
    for head_dim, block_size in product((64, 96, 128), (16, 32, 64, 128)):
        yield ReportedCall(head_dim, block_size, one_pass=True)
    for head_dim, block_size in product((64, 96, 128), (16, 32, 64, 128)):
        yield ReportedCall(head_dim, block_size, query_group=1, decode=True)
    call = ReportedCall(query_group=1, decode=True)
    yield replace(call, causal=False, bias=False)
    yield replace(call, padding=True)
    yield replace(call, kv_heads=2, lists=2)
    yield replace(call, heads=64, kv_heads=1, lists=1)
    yield replace(call, dtype="float16")
    yield replace(call, dtype="float32")
    yield replace(call, head_dim=16)
    yield replace(call, head_dim=32)
    yield replace(call, head_dim=256)


def hopper_calls() -> Iterator[ReportedCall]:
    """Every shape that was timed and what else changes code, for compute capability 9.0."""
    for rows, block_size, head_dim in TIMED:
        yield ReportedCall(head_dim, block_size, rows, causal=False, bias=False, hopper=True)
    for query_group in (64, 128):
        for block_size in BLOCK_SIZES:
            yield ReportedCall(block_size=block_size, query_group=query_group, hopper=True)
            yield ReportedCall(block_size=block_size, query_group=query_group, hopper=True, carried=True)
        call = ReportedCall(query_group=query_group, hopper=True)
        yield replace(call, causal=False, carried=True)
        yield replace(call, head_dim=64)
        yield replace(call, head_dim=96)
        yield replace(call, dtype="float16", key_stride=4, block_size=16)
    yield ReportedCall(query_group=32, kv_heads=2, lists=2, hopper=True)
    yield ReportedCall(query_group=16, kv_heads=2, lists=2, hopper=True)
    yield ReportedCall(lists=1, hopper=True)


def choices() -> Iterator[ReportedChoice]:
    """Every number of blocks that has a tile of its own, and what else changes code, once."""
    for num_blocks, query_group in product((16, 32, 64, 128, 256, 512, 1024, 4096), (1, 64)):
        yield ReportedChoice(num_blocks=num_blocks, query_group=query_group, kv_heads=8 if query_group == 1 else 2)
    for num_blocks in (1024, 4096):
        choice = ReportedChoice(num_blocks=num_blocks)
        yield replace(choice, causal=False, padding=True)
        yield replace(choice, rank=0)
        yield replace(choice, head_dim=16, block_size=4, dtype="float32")
        yield replace(choice, head_dim=96, block_size=48, dtype="float16")
        yield replace(choice, head_dim=256, block_size=128)
    for num_blocks, pool in product((16, 512, 4096), (1, 16, 64)):
        yield replace(_INDEX, num_blocks=num_blocks, pool=pool, kv_heads=2)
    yield replace(_INDEX, columns=1, pool=1, head_dim=64, rank=32, padding=True)
    yield replace(_INDEX, tile=128, block_size=128, columns=128)
