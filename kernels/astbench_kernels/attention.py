"""The product: attention over chosen key blocks, and the choice of what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from astbench_kernels import triton
from astbench_kernels.arguments import check_arguments, once_differentiable, wants_gradients, without_autocast
from astbench_kernels.backends import flex
from astbench_kernels.backends.cpu.query_major import gather_attention, schedule_of
from astbench_kernels.backends.reference import reference_attention
from astbench_kernels.backends.self_check import HOPPER_CALLS, self_check
from astbench_kernels.dispatch import named
from astbench_kernels.layout import BlockLayout
from astbench_kernels.triton.plan import make_plan
from astbench_kernels.watch import KernelCall, watched


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


_TRITON: dict[str, dict[str, Any]] = {
    "triton": {},
    "triton_hopper": {"hopper": True},
    "triton_plain": {"hopper": False},
    "triton_one_pass": {"one_pass": True, "hopper": False},
}
"""Backends of the Triton kernels: what each asks of :func:`make_plan`."""

_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "dense float64-able oracle, O(N x M) memory", reference_attention),
        Backend("gather", "gathers the chosen keys; torch ops, written for CPU", gather_attention),
        Backend(
            "triton",
            "kernels for CUDA; on compute capability 9.0 those for it, where shapes like a call's were timed",
            partial(triton.triton_attention, **_TRITON["triton"]),
            triton.device_refusals,
            lambda call: triton.call_refusals(call.dtype, call.head_dim),
        ),
        Backend(
            "triton_hopper",
            "those for compute capability 9.0 (in Gluon) wherever they serve a call, or a refusal",
            partial(triton.triton_attention, **_TRITON["triton_hopper"]),
            triton.hopper_device_refusals,
            lambda call: triton.hopper_call_refusals(call.dtype, call.head_dim, call.block_size),
        ),
        Backend(
            "triton_plain",
            "those for any CUDA device, on 9.0 too",
            partial(triton.triton_attention, **_TRITON["triton_plain"]),
            triton.device_refusals,
            lambda call: triton.call_refusals(call.dtype, call.head_dim),
        ),
        Backend(
            "triton_one_pass",
            "triton_plain with one backward pass in place of two; to measure which is faster",
            partial(triton.triton_attention, **_TRITON["triton_one_pass"]),
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
    key_valid: Tensor | None = None,
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
        key_valid: Of the call.
    """
    if backend == "gather":
        return named(backend, schedule_of(q, k, v, layout, causal=causal, block_bias=block_bias))
    if backend in _TRITON:
        gradients, padded = wants_gradients(q, k, v, block_bias), key_valid is not None
        plan = make_plan(q, k, v, layout, causal=causal, gradients=gradients, padded=padded, **_TRITON[backend])
        return named(backend, plan.schedule)
    return backend


_checked: set[tuple[torch.device, torch.dtype]] = set()
"""Where the Hopper kernels showed in this process that they give what the reference gives."""


def _check_hopper(ran: str, q: Tensor) -> None:
    """Hold the Hopper kernels against the reference before the first call that takes them; see :func:`self_check`."""
    if ran.endswith("(hopper)"):
        for call in HOPPER_CALLS:
            self_check("triton_hopper", _BACKENDS["triton_hopper"].run, q.device, q.dtype, call)
        _checked.add((q.device, q.dtype))


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
        is zero with log-sum-exp -inf. Both are differentiable in q, k, v and block_bias, once: a gradient with
        `create_graph=True` is refused.

    Raises:
        ValueError: an argument that does not fit, named, or a backend that refuses. What lists hold is looked at on the
            CPU only: a GPU would have to be waited for.

    Cost: time O(query_length x listed keys x head_dim); memory as the backend says.
    """
    check_arguments(q, k, v, layout, block_bias, key_valid)
    gradients = wants_gradients(q, k, v, block_bias)
    head_dim = max(q.shape[-1], v.shape[-1])
    chosen = choose_backend(backend, q.device, dtype=q.dtype, head_dim=head_dim, layout=layout, gradients=gradients)
    run = _BACKENDS[chosen].run
    if _BACKENDS[chosen].foreign:
        self_check(chosen, run, q.device, q.dtype)
    if chosen in _TRITON and triton.is_hopper(q.device) and (q.device, q.dtype) not in _checked:
        _check_hopper(what_runs(chosen, q, k, v, layout, causal=causal, block_bias=block_bias, key_valid=key_valid), q)
    call = KernelCall(q, v, layout, causal, key_valid, gradients)
    with without_autocast(q.device.type), watched(call):
        out, lse = run(
            q,
            k,
            v,
            layout,
            block_bias=block_bias,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            causal=causal,
            key_valid=key_valid,
        )
    return once_differentiable(out, lse) if gradients else (out, lse)
