"""The product: attention over chosen key blocks, and the choice of what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from astbench_kernels import triton
from astbench_kernels.backends import flex
from astbench_kernels.backends.cpu.query_major import gather_attention, schedule_of
from astbench_kernels.backends.reference import reference_attention
from astbench_kernels.backends.self_check import self_check
from astbench_kernels.dispatch import named
from astbench_kernels.layout import BlockLayout
from astbench_kernels.triton.plan import make_plan, wants_gradients


@dataclass(frozen=True)
class CallTraits:
    """What decides whether a backend serves a call; None leaves open what depends on it.

    Attributes:
        device: Type of device.
        dtype: Of the inputs.
        head_dim: The larger of the head sizes of queries and values.
        query_group: Of the layout.
        block_size: Of the layout.
        gradients: Whether a backward pass may follow.
    """

    device: str
    dtype: torch.dtype = torch.float32
    head_dim: int = 1
    query_group: int | None = None
    block_size: int | None = None
    gradients: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to run :func:`block_sparse_attention`.

    Attributes:
        name: What `backend=` takes.
        summary: One line for `astbench doctor`.
        run: The implementation.
        refusals: Given a device type, every reason why it cannot run there; empty when it can.
        call_refusals: Given a call, every reason why it cannot serve it on a device where it runs.
        foreign: Not this project's code: compared with the reference before its first call in each dtype.
    """

    name: str
    summary: str
    run: Callable[..., tuple[Tensor, Tensor]]
    refusals: Callable[[str], list[str]] = lambda device: []
    call_refusals: Callable[[CallTraits], list[str]] = lambda call: []
    foreign: bool = False


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "dense float64-able oracle, O(N x M) memory", reference_attention),
        Backend("gather", "gathers the chosen keys; torch ops, written for CPU", gather_attention),
        Backend(
            "triton",
            "kernels for CUDA",
            triton.triton_attention,
            triton.device_refusals,
            lambda call: triton.call_refusals(call.dtype, call.head_dim),
        ),
        Backend(
            "triton_one_pass",
            "the same with one backward pass in place of two; to measure which is faster",
            partial(triton.triton_attention, one_pass=True),
            triton.device_refusals,
            lambda call: [*triton.call_refusals(call.dtype, call.head_dim), *triton.one_pass_refusals()],
        ),
        Backend(
            "flex",
            "torch's FlexAttention, compiled on CUDA; on the CPU dense arithmetic, O(N x M) time and memory",
            flex.flex_attention,
            flex.device_refusals,
            lambda call: flex.call_refusals(
                call.device,
                call.dtype,
                query_group=call.query_group,
                block_size=call.block_size,
                gradients=call.gradients,
            ),
            foreign=True,
        ),
    )
}


def sparse_backends() -> dict[str, Backend]:
    """Every backend by name, whether or not it can run here."""
    return dict(_BACKENDS)


def choose_backend(
    name: str,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    layout: BlockLayout | None = None,
    gradients: bool = False,
) -> str:
    """The backend that `name` ("auto" or a backend's name) stands for.

    "auto" is triton on CUDA where it can run and serve the call, else gather (:mod:`astbench_kernels.dispatch`). A
    backend that is asked for by name runs or refuses; nothing else is tried.

    Args:
        name: "auto" or a name from :func:`sparse_backends`.
        device: Where the call will run.
        dtype: Of the inputs; None leaves open what depends on it.
        head_dim: The larger of the head sizes of queries and values; None likewise.
        layout: The lists; None likewise.
        gradients: Whether a backward pass may follow.

    Raises:
        ValueError: unknown name, or a backend that refuses, with all its reasons.
    """
    call = CallTraits(
        device.type,
        torch.float32 if dtype is None else dtype,
        head_dim or 1,
        None if layout is None else layout.query_group,
        None if layout is None else layout.block_size,
        gradients,
    )
    if name == "auto":
        return "triton" if device.type == "cuda" and not _refusals("triton", call) else "gather"
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; set backend to one of auto, {', '.join(_BACKENDS)}")
    reasons = _refusals(name, call)
    if reasons:
        raise ValueError(f"backend {name!r} cannot run on {device.type}: {'; '.join(reasons)}")
    return name


def _refusals(name: str, call: CallTraits) -> list[str]:
    backend = _BACKENDS[name]
    return [*backend.refusals(call.device), *backend.call_refusals(call)]


def what_runs(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool,
    block_bias: Tensor | None = None,
) -> str:
    """The backend with the schedule that it takes for a call, "gather (key-major)": what records hold.

    Args:
        backend: What :func:`choose_backend` returned.
        q: Queries of the call.
        k: Keys.
        v: Values.
        layout: The lists.
        causal: Whether under a causal mask.
        block_bias: Of the call.
    """
    if backend == "gather":
        return named(backend, schedule_of(q, k, v, layout, causal=causal))
    if backend.startswith("triton"):
        gradients = wants_gradients(q, k, v, block_bias)
        return named(backend, make_plan(q, k, v, layout, causal=causal, gradients=gradients).schedule)
    return backend


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
            aligned with `layout.indices`. Gets a gradient: the way a task loss reaches a block predictor. -inf hides a
            block; so may `torch.finfo(dtype).min`, which overflows where logits are kept in powers of two.
        scale: Factor on `q . k`; 1/sqrt(head_dim) by default.
        causal: Query at position p sees keys at positions <= p (positions as in :class:`BlockLayout`).
        key_valid: Bool `(batch, key_length)`, False for padding; what padding holds never matters.
        backend: "auto" or a name from :func:`sparse_backends`.

    Returns:
        `out` `(batch, heads, query_length, value_dim)` in the dtype of `q`, and the log-sum-exp of each row's
        logits `(batch, heads, query_length)` in float32 (float64 for float64 inputs). A row that sees nothing
        is zero with log-sum-exp -inf. Both are differentiable in q, k, v and block_bias.

    Raises:
        ValueError: shapes that do not fit together, or a backend that refuses.

    Cost: time O(query_length x listed keys x head_dim); memory as the backend says.
    """
    _check(q, k, v, layout, block_bias, key_valid)
    gradients = wants_gradients(q, k, v, block_bias)
    head_dim = max(q.shape[-1], v.shape[-1])
    chosen = choose_backend(backend, q.device, dtype=q.dtype, head_dim=head_dim, layout=layout, gradients=gradients)
    run = _BACKENDS[chosen].run
    if _BACKENDS[chosen].foreign:
        self_check(chosen, run, q.device, q.dtype)
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
    if not problems and layout.indices.device.type == "cpu":  # a GPU would have to be waited for
        problems = _wrong_lists(layout)
    if problems:
        raise ValueError("; ".join(problems))


def _wrong_lists(layout: BlockLayout) -> list[str]:
    """What a kernel would read beyond the keys for, in another head's or nobody's memory."""
    problems = []
    width, listed = layout.indices.shape[-1], layout.indices.masked_fill(~layout.slots, 0)
    if layout.counts.numel() and not 0 <= int(layout.counts.min()) <= int(layout.counts.max()) <= width:
        problems.append(f"layout.counts must be within 0 and the width of the lists, {width}")
    if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < max(1, layout.num_blocks):
        problems.append(f"layout.indices must name blocks 0 to {layout.num_blocks - 1}")
    return problems
