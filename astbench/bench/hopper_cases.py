"""Kinds of call that the Hopper kernels must get right, each held against float64 attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from astbench_kernels import BlockLayout, block_sparse_attention
from astbench_kernels.layout import ceil_div

Attend = Callable[..., tuple[Tensor, Tensor]]
"""As :func:`block_sparse_attention`: q, k, v, layout, block_bias=, causal= -> output, log-sum-exp."""

OUTPUT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error that is allowed; of gradients three times as much, of the log-sum-exp LSE."""
LSE = 1e-4


@dataclass(frozen=True)
class Case:
    """A call; sizes as in :class:`BlockLayout`, `lists` list heads, `density` of the blocks drawn at random.

    Attributes:
        uneven: Lists of any length, every third one empty.
        strided: Inputs laid out as (batch, rows, heads, dim).
        lse: The loss holds the log-sum-exp too.
        carried: Blocks that only later rows of a group see.
        loud: A bias so large that exp2 of it overflows.
    """

    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    lists: int = 4
    rows: int = 1024
    keys: int = 0
    dim: int = 128
    block: int = 64
    group: int = 128
    density: float = 0.25
    causal: bool = False
    key_stride: int = 1
    offset: int = 0
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    uneven: bool = False
    strided: bool = False
    lse: bool = False
    carried: bool = False
    loud: bool = False

    @property
    def key_length(self) -> int:
        """Keys; as many as the last query's position shows when `keys` is left out."""
        return self.keys or (self.rows + self.offset) // self.key_stride


CASES = {
    "128 rows": Case(),
    "64 rows": Case(group=64),
    "256 rows": Case(group=256),
    "causal": Case(causal=True),
    "causal, 64 rows": Case(causal=True, group=64),
    "bias": Case(bias=True),
    "bias, 64 rows, causal": Case(bias=True, group=64, causal=True),
    "grouped heads": Case(heads=8, kv_heads=2, lists=2, group=32, causal=True, bias=True),
    "grouped heads, 64 rows": Case(heads=8, kv_heads=2, lists=2, group=16, batch=2),
    "a list a query head": Case(heads=8, kv_heads=2, lists=8, bias=True),
    "one list for all": Case(lists=1, causal=True, bias=True),
    "blocks of 16": Case(block=16, bias=True),
    "blocks of 16, 64 rows, causal": Case(block=16, group=64, causal=True, bias=True),
    "blocks of 32": Case(block=32, causal=True, bias=True),
    "blocks of 128": Case(block=128, causal=True, bias=True),
    "blocks of 128, 64 rows": Case(block=128, group=64, causal=True, bias=True),
    "heads of 64": Case(dim=64, causal=True),
    "heads of 64, 64 rows": Case(dim=64, group=64),
    "heads of 96": Case(dim=96, causal=True),
    "float16": Case(dtype=torch.float16, causal=True),
    "ragged": Case(rows=1000, offset=96, keys=1096, causal=True),
    "ragged, both directions": Case(rows=1000, keys=1010, bias=True),
    "ragged, 64 rows": Case(rows=1000, keys=1010, group=64, batch=2),
    "coarse keys": Case(causal=True, key_stride=4, block=16),
    "uneven, some empty": Case(uneven=True, causal=True, lse=True),
    "uneven, 64 rows": Case(uneven=True, group=64, bias=True),
    "strided": Case(strided=True, causal=True),
    # What the prototype did not have.
    "carried": Case(carried=True, causal=True),
    "carried, 64 rows": Case(carried=True, causal=True, group=64, bias=True),
    "carried, blocks of 16": Case(carried=True, causal=True, group=64, block=16, offset=40),
    "carried, blocks of 128": Case(carried=True, causal=True, block=128, group=64, dim=64),
    "carried, grouped heads": Case(carried=True, causal=True, heads=8, kv_heads=2, lists=2, group=32),
    "carried, both directions": Case(carried=True, bias=True, rows=1000, keys=1010),
    "loud bias, ragged": Case(bias=True, loud=True, rows=1000, offset=40, group=64),
}
"""The first 27 are those that a prototype of the kernels was held to on an H200."""


def smaller(case: Case, by: int) -> Case:
    """The same with so many times fewer rows and keys, and half of 4 heads, for where each takes long."""
    if case.heads == 4:
        case = replace(case, heads=2, kv_heads=2, lists=min(2, case.lists))
    return replace(case, rows=case.rows // by, keys=case.keys // by and case.keys // by + 3)


def make(case: Case, device: str, seed: int) -> tuple[list[Tensor], BlockLayout]:
    """[q, k, v, bias], and the lists."""
    g = torch.Generator().manual_seed(seed)
    groups = ceil_div(case.offset + case.rows, case.group) - case.offset // case.group
    blocks = ceil_div(case.key_length, case.block)
    share = torch.rand(case.batch, case.lists, groups, 1, generator=g) if case.uneven else case.density
    keep = torch.rand(case.batch, case.lists, groups, blocks, generator=g) < share
    if case.uneven:
        keep[:, :, ::3] = False
    layout = BlockLayout.from_mask(
        keep.to(device),
        block_size=case.block,
        query_group=case.group,
        query_length=case.rows,
        key_length=case.key_length,
        query_offset=case.offset,
        key_stride=case.key_stride,
    )
    if case.carried:  # half of the blocks from a row on, some for nobody
        since = torch.randint(-case.group, case.group + 1, layout.indices.shape, generator=g, dtype=torch.int32)
        layout = replace(layout, since=since.clamp(min=0).to(device))
    sizes = ((case.heads, case.rows), (case.kv_heads, case.key_length), (case.kv_heads, case.key_length))
    inputs = []
    for heads, rows in sizes:
        shape = (rows, heads) if case.strided else (heads, rows)
        x = torch.randn(case.batch, *shape, case.dim, generator=g).to(device, case.dtype)
        inputs.append(x.transpose(1, 2) if case.strided else x)
    bias = torch.randn(layout.indices.shape, generator=g).to(device)
    return [*inputs, bias + 200 if case.loud else bias], layout


def errors(case: Case, attend: Attend, device: str, seed: int = 0) -> dict[str, float]:
    """Relative error of output, log-sum-exp and every gradient; inf where rows that see nothing differ."""
    inputs, layout = make(case, device, seed)
    found = _results(case, attend, inputs, layout, seed)

    def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(*args, **kwargs, backend="reference")

    expected = _results(case, reference, [x.double() for x in inputs], layout, seed)
    empty = expected["lse"] == -torch.inf
    if not torch.equal(found["lse"] == -torch.inf, empty) or bool((found["out"][empty] != 0).any()):
        return {"a row that sees nothing": torch.inf}
    for results in (found, expected):
        results["lse"] = results["lse"].masked_fill(empty, 0.0)
    return {name: _off(found[name], right) for name, right in expected.items()}


def wrong(case: Case, found: dict[str, float]) -> list[str]:
    """What of these errors is more than is allowed, in words."""
    allowed = {"out": OUTPUT[case.dtype], "lse": LSE}
    limits = {name: allowed.get(name, 3 * OUTPUT[case.dtype]) for name in found}
    return [
        f"{name} is {found[name]:.1e} off, allowed is {limits[name]:.0e}"
        for name in found
        if not found[name] <= limits[name]
    ]


def _results(case: Case, attend: Attend, inputs: list[Tensor], layout: BlockLayout, seed: int) -> dict[str, Tensor]:
    q, k, v, bias = (x.detach().requires_grad_() for x in inputs)
    out, lse = attend(q, k, v, layout, block_bias=bias if case.bias else None, causal=case.causal)
    g = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(out.shape, generator=g).to(out.device, case.dtype)
    loss = (out * weight.to(out.dtype)).sum()
    if case.lse:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * torch.randn(lse.shape, generator=g).to(lse)).sum()
    wanted = (q, k, v, bias) if case.bias else (q, k, v)
    gradients = torch.autograd.grad(loss, wanted)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv", "dbias"), gradients, strict=False))}


def _off(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm().clamp(min=1e-30))
