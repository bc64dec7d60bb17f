"""A backend that is not this project's code shows that it is right before it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from astbench_kernels.backends.reference import reference_attention
from astbench_kernels.layout import BlockLayout

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative RMS error against the float64 reference of the same inputs: the kernel tests' own."""

Run = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CheckedCall:
    """What a backend is checked with, beside what every such call has.

    Attributes:
        query_group: Of the layout.
        head_dim: Head size.
        padding: Keys that are padding and hold NaN.
        carried: Lists that grow within their group.
        instead: Backends to set instead, in the error.
    """

    query_group: int = 64
    head_dim: int = 32
    padding: bool = True
    carried: bool = False
    instead: str = "another one or to auto"


DEFAULT_CALL = CheckedCall()

HOPPER_CALLS = tuple(CheckedCall(group, 64, False, True, "triton_plain") for group in (64, 128))
"""For the Hopper kernels: tiles of one and of two warpgroups."""


def self_check(name: str, run: Run, device: torch.device, dtype: torch.dtype, call: CheckedCall = DEFAULT_CALL) -> None:
    """Return if a backend's output, log-sum-exp and gradients are the reference's; computed once a process.

    The call has shared heads, a causal mask with an offset, a block bias, rows that see nothing, a short last block,
    a group cut short, and what `call` says.

    Args:
        name: Of the backend.
        run: Its implementation.
        device: Where.
        dtype: Of the inputs.
        call: What else it is checked with.

    Raises:
        ValueError: an error above TOLERANCE, with everything that is off and by how much.
    """
    errors = measured_errors(run, str(device), dtype, call)
    wrong = [f"{what} is off by {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE[dtype]]
    if wrong:
        dtype_name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"backend {name!r} is refused on {device.type} in {dtype_name}: against the reference "
            f"{', '.join(wrong)}, allowed is {TOLERANCE[dtype]:.0e}; set backend to {call.instead}"
        )


@cache
def measured_errors(run: Run, device: str, dtype: torch.dtype, call: CheckedCall = DEFAULT_CALL) -> dict[str, float]:
    """Relative RMS error of everything that a backend computes, by name; inf where rows that see nothing differ."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs, layout, valid = _call(torch.device(device), dtype, call)
        got = _results(run, inputs, layout, valid)
        expected = _results(reference_attention, [x.double() for x in inputs], layout, valid)
    empty = expected["lse"] == -torch.inf
    if not torch.equal(got["lse"] == -torch.inf, empty) or bool((got["out"][empty] != 0).any()):
        return {"a row that sees nothing": torch.inf}
    errors = {}
    for name, value in got.items():
        a, b = value.double(), expected[name]
        if name == "lse":
            a, b = a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
        errors[name] = float((a - b).norm() / b.norm())
    return errors


def _call(
    device: torch.device, dtype: torch.dtype, call: CheckedCall = DEFAULT_CALL
) -> tuple[list[Tensor], BlockLayout, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, rows, keys, size, offset = 2, 4, 2, 101, 199, 32, 98
    dim, group = call.head_dim, call.query_group
    keep = torch.rand(batch, heads, -(-keys // group) - offset // group, 7, generator=g) < 0.5
    keep[0, 1, 0] = False
    layout = BlockLayout.from_mask(
        keep.to(device),
        block_size=size,
        query_group=group,
        query_length=rows,
        key_length=keys,
        query_offset=offset,
    )
    if call.carried:
        since = torch.randint(-group, group, layout.indices.shape, generator=g, dtype=torch.int32)
        layout = replace(layout, since=since.clamp(min=0).to(device))
    valid = None
    if call.padding:
        valid = torch.rand(batch, keys, generator=g) < 0.9
        # Whole blocks of it, too, and a block that is not padded at all.
        valid[:, : 2 * size] = torch.tensor([True, False]).repeat_interleave(size)
    shapes = ((batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    if valid is not None:
        for x in (k, v):
            x.masked_fill_(~valid[:, None, :, None], torch.nan)
    bias = torch.randn(layout.indices.shape, generator=g)
    return [x.to(device, dtype) for x in (q, k, v, bias)], layout, None if valid is None else valid.to(device)


def _results(run: Run, inputs: list[Tensor], layout: BlockLayout, valid: Tensor | None) -> dict[str, Tensor]:
    q, k, v, bias = (x.detach().requires_grad_() for x in inputs)
    scale = q.shape[-1] ** -0.5
    out, lse = run(q, k, v, layout, block_bias=bias, scale=scale, causal=True, key_valid=valid)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=g).to(out)
    lse_weight = torch.randn(lse.shape, generator=g).to(lse)
    loss = (out * weight).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * lse_weight).sum()
    grads = torch.autograd.grad(loss, (q, k, v, bias), materialize_grads=True)
    names = ("d q", "d k", "d v", "d block_bias")
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}
