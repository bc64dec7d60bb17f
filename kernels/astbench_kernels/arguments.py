"""What a call of the kernels may be given, checked once for all backends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from astbench_kernels.layout import BlockLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wants_gradients(*inputs: Tensor | None) -> bool:
    """Whether a backward pass may follow a call with these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Within, products keep the dtype of what they multiply.

    Only where it is on is torch.autocast entered, which takes as long as several operations of a step of decoding.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, block_bias: Tensor | None, key_valid: Tensor | None
) -> None:
    """Return if :func:`astbench_kernels.block_sparse_attention` can be called with these.

    Raises:
        ValueError: with every reason, each naming the argument.
    """
    problems = _shapes(q, k, v, layout) + _kinds(q, k, v, layout, block_bias, key_valid)
    if block_bias is not None and block_bias.shape != layout.indices.shape:
        problems.append(
            f"block_bias {tuple(block_bias.shape)} must align with layout.indices {tuple(layout.indices.shape)}"
        )
    if k.dim() == 4 and key_valid is not None and key_valid.shape != (k.shape[0], k.shape[2]):
        problems.append(f"key_valid must be {(k.shape[0], k.shape[2])}, got {tuple(key_valid.shape)}")
    # A GPU would have to be waited for; and lists by the hundred thousand are not read again for each call.
    if not problems and layout.indices.device.type == "cpu" and not layout.sound:
        problems = _lists(layout)
    if problems:
        raise ValueError("; ".join(problems))


def _shapes(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> list[str]:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return ["q, k and v must be (batch, heads, length, head_dim)"]
    if k.shape[:3] != v.shape[:3]:
        return [f"k and v differ: {tuple(k.shape)} and {tuple(v.shape)}"]
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        return [f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: kv heads must divide heads"]
    if (layout.query_length, layout.key_length) != (q.shape[2], k.shape[2]):
        return [
            f"the layout is for {layout.query_length} queries and {layout.key_length} keys, "
            f"got {q.shape[2]} and {k.shape[2]}"
        ]
    if layout.indices.shape[0] != q.shape[0] or layout.indices.shape[1] not in (1, k.shape[1], q.shape[1]):
        return [f"layout lists {tuple(layout.indices.shape[:2])} must be (batch, 1 or {k.shape[1]} or {q.shape[1]})"]
    return []


def _kinds(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, block_bias: Tensor | None, key_valid: Tensor | None
) -> list[str]:
    """Dtypes and devices."""
    problems = []
    if q.dtype != k.dtype or q.dtype != v.dtype:
        problems.append(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    elif q.dtype not in DTYPES:
        problems.append(f"q, k and v must be {', '.join(map(_short, DTYPES))}, got {_short(q.dtype)}")
    if block_bias is not None and not block_bias.is_floating_point():
        problems.append(f"block_bias must be floating-point, got {_short(block_bias.dtype)}")
    if key_valid is not None and key_valid.dtype != torch.bool:
        problems.append(f"key_valid must be bool, True for real keys, got {_short(key_valid.dtype)}")
    whole = {"layout.indices": layout.indices, "layout.counts": layout.counts, "layout.since": layout.since}
    for name, x in whole.items():
        if x is None:
            continue
        if x.is_floating_point() or x.dtype == torch.bool:
            problems.append(f"{name} must be int32 or int64, got {_short(x.dtype)}")
    given = {
        "q": q,
        "k": k,
        "v": v,
        "layout": layout.indices,
        "layout.since": layout.since,
        "block_bias": block_bias,
        "key_valid": key_valid,
    }
    where = {name: x.device for name, x in given.items() if x is not None}
    problems += [
        f"{name} is on the meta device: there is nothing to compute" for name in where if where[name].type == "meta"
    ]
    if len(set(where.values())) > 1:
        problems.append("all must be on one device, got " + ", ".join(f"{name} on {x}" for name, x in where.items()))
    return problems


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lists(layout: BlockLayout) -> list[str]:
    """What a kernel would read beyond the keys for, in another head's or nobody's memory, or count twice."""
    problems = []
    width, slots = layout.indices.shape[-1], layout.slots
    listed = layout.indices.masked_fill(~slots, 0)
    if layout.counts.numel() and not 0 <= int(layout.counts.min()) <= int(layout.counts.max()) <= width:
        problems.append(f"layout.counts must be within 0 and the width of the lists, {width}")
    if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < max(1, layout.num_blocks):
        problems.append(f"layout.indices must name blocks 0 to {layout.num_blocks - 1}")
    if layout.since is not None and layout.since.numel():
        since = layout.since.masked_fill(~slots, 0)
        if not 0 <= int(since.min()) <= int(since.max()) <= layout.query_group:
            problems.append(f"layout.since must be rows of a group, 0 to {layout.query_group}")
    if not problems and _repeats(layout.indices, slots):
        problems.append("layout.indices must name each block of a list once")
    return problems


def _repeats(indices: Tensor, slots: Tensor) -> bool:
    """Whether a list names a block twice; lists in ascending order, the usual ones, are not sorted for it."""
    rises = indices[..., 1:] > indices[..., :-1]
    if bool((rises | ~slots[..., 1:]).all()):
        return False
    # Padding counts as blocks that there are not, each another one.
    nobody = -1 - torch.arange(indices.shape[-1], device=indices.device)
    ranked = torch.where(slots, indices.long(), nobody).sort(-1).values
    return bool((ranked[..., 1:] == ranked[..., :-1]).any())


class _OnceDifferentiable(torch.autograd.Function):
    """The tensors themselves; a second derivative through them is refused, where some backends would give zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError(
                "block_sparse_attention gives first derivatives only: leave create_graph out (argument of backward "
                "and torch.autograd.grad)"
            )
        return grads


def once_differentiable(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are; a gradient of their gradient raises a ValueError."""
    first, second = _OnceDifferentiable.apply(out, lse)
    return first, second
