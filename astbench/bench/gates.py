"""No number without this: the very call that is timed, held against the reference on a sample of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from astbench_kernels import BlockLayout, block_sparse_attention

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative RMS of outputs, as in the kernels' tests; of gradients three times as much, for they are products of
rounded products."""
ROWS = 64
"""Query rows in the sample, over all heads."""


def wrong(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: BlockLayout,
    *,
    causal: bool,
    training: bool,
) -> str:
    """What is wrong with a call, in one line; empty when it is right.

    The reference is computed in float64, head by head, for the sampled rows alone. With `training` the loss weighs
    just those rows, so that all gradients follow from them.

    Args:
        attend: q, k, v -> output, `(batch, heads, query_length, head_dim)`.
        tensors: q, k, v of the timed shape.
        layout: The lists that it runs on.
        causal: As in the call.
        training: Look at the gradients too.

    Cost: O(ROWS x key_length) time, and memory for one head's keys in float64.
    """
    q, k, v = (x.detach().requires_grad_(training) for x in tensors)
    rows = _sample(q)
    with torch.set_grad_enabled(training):
        out = attend(q, k, v)
    found = {"output": out.detach()[:, :, rows]}
    expected = {"output": torch.zeros(found["output"].shape, dtype=torch.float64, device=q.device)}
    weight = torch.zeros_like(out)
    weight[:, :, rows] = torch.randn(found["output"].shape, dtype=q.dtype, device=q.device)
    names = [f"gradient of {x}" for x in ("q", "k", "v")] if training else []
    if training:
        found |= dict(zip(names, torch.autograd.grad(out, (q, k, v), weight), strict=True))
        expected |= {name: torch.zeros_like(found[name], dtype=torch.float64) for name in names}
    del out
    for head, key_head, leaves, outputs in _reference(q, k, v, layout, rows, causal=causal, training=training):
        expected["output"][:, head] = outputs.detach()
        if training:
            loss_weight = weight[:, head, rows].to(torch.float64)
            for name, where, gradient in zip(
                names, (head, key_head, key_head), torch.autograd.grad(outputs, leaves, loss_weight), strict=True
            ):
                expected[name][:, where] += gradient[:, 0]
    return _first_error(found, expected, q.dtype)


def _sample(q: Tensor) -> Tensor:
    """Rows to look at, the first and the last among them."""
    length = q.shape[2]
    count = min(length, max(4, ROWS // q.shape[1]))
    rows = torch.randperm(length, device=q.device)[:count]
    rows[0], rows[-1] = 0, length - 1
    return rows.unique()


def _reference(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, rows: Tensor, *, causal: bool, training: bool
) -> Iterator[tuple[int, int, list[Tensor], Tensor]]:
    """For each query head: its number, its key head's, (q, k, v) in float64, and the rows' outputs."""
    group_of, lists = layout.row_groups(), layout.indices.shape[1]
    for head in range(q.shape[1]):
        key_head = head * k.shape[1] // q.shape[1]
        own = head * lists // q.shape[1]
        parts = ((q, head), (k, key_head), (v, key_head))
        leaves = [x.detach()[:, at : at + 1].double().requires_grad_(training) for x, at in parts]
        wide_q, wide_k, wide_v = leaves
        outputs = []
        for row in rows.tolist():
            group = int(group_of[row])
            place = slice(None), slice(own, own + 1), slice(group, group + 1)
            here = replace(
                layout,
                indices=layout.indices[place],
                counts=layout.counts[place],
                since=None if layout.since is None else layout.since[place],
                query_length=1,
                query_offset=layout.query_offset + row,
            )
            with torch.set_grad_enabled(training):
                one, _ = block_sparse_attention(
                    wide_q[:, :, row : row + 1], wide_k, wide_v, here, causal=causal, backend="reference"
                )
            outputs.append(one[:, 0])
        yield head, key_head, leaves, torch.cat(outputs, 1)


def _first_error(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str:
    for name, right in expected.items():
        size = right.square().mean().sqrt()
        error = float((found[name].double() - right).square().mean().sqrt() / size.clamp(min=1e-30))
        allowed = TOLERANCE[dtype] * (1 if name == "output" else 3)
        if not error <= allowed:  # NaN is an error too
            return f"gate: {name} is {error:.1e} off the reference (relative RMS, allowed {allowed:.0e})"
    return ""
