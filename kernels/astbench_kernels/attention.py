"""The product: attention over chosen key blocks, and the choice of what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from astbench_kernels.gather import gather_attention
from astbench_kernels.layout import BlockLayout
from astbench_kernels.reference import reference_attention
from astbench_kernels.triton import call_refusals, device_refusals, triton_attention


@dataclass(frozen=True)
class Backend:
    """One way to run :func:`block_sparse_attention`.

    Attributes:
        name: What `backend=` takes.
        summary: One line for `astbench doctor`.
        run: The implementation.
        refusals: Given a device type, every reason why it cannot run there; empty when it can.
        call_refusals: Given a dtype and the larger head size, every reason why it cannot serve such a call.
    """

    name: str
    summary: str
    run: Callable[..., tuple[Tensor, Tensor]]
    refusals: Callable[[str], list[str]] = lambda device: []
    call_refusals: Callable[[torch.dtype, int], list[str]] = lambda dtype, head_dim: []


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "dense float64-able oracle, O(N x M) memory", reference_attention),
        Backend("gather", "gathers the chosen keys; torch ops, written for CPU", gather_attention),
        Backend("triton", "kernels for CUDA", triton_attention, device_refusals, call_refusals),
    )
}


def backends() -> dict[str, Backend]:
    """Every backend by name, whether or not it can run here."""
    return dict(_BACKENDS)


def choose_backend(
    name: str, device: torch.device, *, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str:
    """The backend that `name` ("auto" or a backend's name) stands for.

    "auto" is triton on CUDA where it can run and serve the call, else gather. A backend that is asked for by name
    runs or refuses; nothing else is tried.

    Args:
        name: "auto" or a name from :func:`backends`.
        device: Where the call will run.
        dtype: Of the inputs; None leaves open what depends on it.
        head_dim: The larger of the head sizes of queries and values; None likewise.

    Raises:
        ValueError: unknown name, or a backend that refuses, with all its reasons.
    """
    if name == "auto":
        return "triton" if device.type == "cuda" and not _refusals("triton", device, dtype, head_dim) else "gather"
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; set backend to one of auto, {', '.join(_BACKENDS)}")
    reasons = _refusals(name, device, dtype, head_dim)
    if reasons:
        raise ValueError(f"backend {name!r} cannot run on {device.type}: {'; '.join(reasons)}")
    return name


def _refusals(name: str, device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> list[str]:
    backend = _BACKENDS[name]
    call = backend.call_refusals(torch.float32 if dtype is None else dtype, head_dim or 1)
    return [*backend.refusals(device.type), *call]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_valid: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query group over the key blocks that its list names.

    Args:
        q: Queries, `(batch, heads, query_length, head_dim)`, fp16/bf16/fp32/fp64.
        k: Keys, `(batch, kv_heads, key_length, head_dim)`; `kv_heads` divides `heads`.
        v: Values, `(batch, kv_heads, key_length, value_dim)`.
        layout: The lists, for 1, `kv_heads` or `heads` list heads.
        block_bias: Added to the logits of every key in a listed block, `(batch, list_heads, groups, width)`,
            aligned with `layout.indices`. Gets a gradient: the way a task loss reaches a block predictor.
        scale: Factor on `q . k`; 1/sqrt(head_dim) by default.
        causal: Query at position p sees keys at positions <= p (positions as in :class:`BlockLayout`).
        key_valid: Bool `(batch, key_length)`, False for padding; what padding holds never matters.
        backend: "auto" or a name from :func:`backends`.

    Returns:
        `out` `(batch, heads, query_length, value_dim)` in the dtype of `q`, and the log-sum-exp of each row's
        logits `(batch, heads, query_length)` in float32 (float64 for float64 inputs). A row that sees nothing
        is zero with log-sum-exp -inf. Both are differentiable in q, k, v and block_bias.

    Raises:
        ValueError: shapes that do not fit together, or a backend that refuses.

    Cost: time O(query_length x listed keys x head_dim); memory as the backend says.
    """
    _check(q, k, v, layout, block_bias, key_valid)
    chosen = choose_backend(backend, q.device, dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1]))
    run = _BACKENDS[chosen].run
    with torch.autocast(q.device.type, enabled=False):
        return run(
            q,
            k,
            v,
            layout,
            block_bias=block_bias,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            causal=causal,
            key_valid=key_valid,
        )


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, block_bias: Tensor | None, key_valid: Tensor | None
) -> None:
    problems = []
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        problems.append("q, k and v must be (batch, heads, length, head_dim)")
    elif k.shape[:3] != v.shape[:3]:
        problems.append(f"k and v differ: {tuple(k.shape)} and {tuple(v.shape)}")
    elif q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        problems.append(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: kv heads must divide heads")
    elif (layout.query_length, layout.key_length) != (q.shape[2], k.shape[2]):
        problems.append(
            f"the layout is for {layout.query_length} queries and {layout.key_length} keys, "
            f"got {q.shape[2]} and {k.shape[2]}"
        )
    elif layout.indices.shape[0] != q.shape[0] or layout.indices.shape[1] not in (1, k.shape[1], q.shape[1]):
        problems.append(
            f"layout lists {tuple(layout.indices.shape[:2])} must be (batch, 1 or {k.shape[1]} or {q.shape[1]})"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        problems.append(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if block_bias is not None and block_bias.shape != layout.indices.shape:
        problems.append(
            f"block_bias {tuple(block_bias.shape)} must align with layout.indices {tuple(layout.indices.shape)}"
        )
    if key_valid is not None and key_valid.shape != (k.shape[0], k.shape[2]):
        problems.append(f"key_valid must be {(k.shape[0], k.shape[2])}, got {tuple(key_valid.shape)}")
    if problems:
        raise ValueError("; ".join(problems))
