"""Dense attention by the implementation that is asked for: torch's own choice, one of its kernels, or a package."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

HALF = (torch.float16, torch.bfloat16)
HIDDEN = -3e4
"""Added to hidden logits by xformers: finite in float16, so that a row that sees nothing is no NaN."""


@dataclass(frozen=True)
class DenseCall:
    """The inputs of one call; see :func:`dense_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor | None
    causal: bool
    scale: float

    @property
    def repeats(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def square(self) -> bool:
        """As many keys as queries."""
        return self.q.shape[2] == self.k.shape[2]


@dataclass(frozen=True)
class DenseBackend:
    """One way to run :func:`dense_attention`.

    Attributes:
        name: What `backend=` takes.
        summary: One line for `astbench doctor`.
        run: The implementation.
        device_refusals: Given a device type, every reason why it cannot run there; empty when it can.
        call_refusals: Every reason why it cannot serve this call, on a device where it runs.
    """

    name: str
    summary: str
    run: Callable[[DenseCall], Tensor]
    device_refusals: Callable[[str], list[str]]
    call_refusals: Callable[[DenseCall], list[str]]


def dense_backends() -> dict[str, DenseBackend]:
    """Every backend by name, whether or not it can run here; "auto" is not among them."""
    return dict(_BACKENDS)


def check_dense_backend(name: str, device: str) -> None:
    """Return if `name` ("auto" or a backend's name) runs on this type of device.

    Raises:
        ValueError: it does not, with all its reasons and what does.
    """
    if name == "auto":
        return
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; set backend to one of auto, {', '.join(_BACKENDS)}")
    reasons = _BACKENDS[name].device_refusals(device)
    if reasons:
        able = ", ".join(["auto", *(b.name for b in _BACKENDS.values() if not b.device_refusals(device))])
        raise ValueError(f"backend {name!r} cannot run on {device}: {'; '.join(reasons)} (here run: {able})")


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allowed: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over all allowed keys.

    Args:
        q: Queries, `(batch, heads, query_length, head_dim)`.
        k: Keys, `(batch, kv_heads, key_length, head_dim)`; `kv_heads` divides `heads`.
        v: Values, as `k`.
        allowed: Bool, broadcastable to `(batch, heads, query_length, key_length)`; None for every key.
        causal: The last query sees all keys, the one before it all but the last, and so on; not with `allowed`.
        scale: Factor on `q . k`; 1/sqrt(head_dim) by default.
        backend: "auto" (torch chooses) or a name from :func:`dense_backends`.

    Returns:
        As `q`. Rows that see nothing are zero.

    Raises:
        ValueError: a backend that cannot serve this call, with all its reasons. Nothing else is tried.

    Cost: O(query_length x key_length x head_dim) time; memory as the backend says.
    """
    check_dense_backend(backend, q.device.type)
    # One query at the end sees every key: no mask is needed, which some backends do not have.
    causal = causal and q.shape[2] > 1
    seeing = None if allowed is None else allowed.any(-1, keepdim=True)
    if allowed is not None and seeing is not None and backend != "auto":
        allowed = allowed | ~seeing  # some kernels return NaN for rows that see nothing
    call = DenseCall(q, k, v, allowed, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "auto":
        out = _sdpa(call)
    else:
        reasons = _BACKENDS[backend].call_refusals(call)
        if reasons:
            raise ValueError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
        out = _BACKENDS[backend].run(call)
    return out if seeing is None else out.masked_fill(~seeing, 0.0)


# ----- torch


def _sdpa(call: DenseCall, kernel: SDPBackend | None = None) -> Tensor:
    allowed = call.allowed
    if call.causal and not call.square:  # torch's own flag counts from the first key
        rows, keys = call.q.shape[2], call.k.shape[2]
        allowed = torch.ones(rows, keys, dtype=torch.bool, device=call.q.device).tril(keys - rows)
    k, v, grouped = call.k, call.v, call.repeats > 1
    if grouped and kernel == SDPBackend.EFFICIENT_ATTENTION:  # it wants as many key as query heads
        k, v, grouped = _repeated(k, call), _repeated(v, call), False
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        return scaled_dot_product_attention(
            call.q,
            k,
            v,
            attn_mask=allowed,
            is_causal=call.causal and allowed is None,
            scale=call.scale,
            enable_gqa=grouped,
        )


def _torch_kernel(kernel: SDPBackend) -> Callable[[DenseCall], Tensor]:
    def run(call: DenseCall) -> Tensor:
        try:
            return _sdpa(call, kernel)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if "No viable backend" not in text and "No available kernel" not in text:
                raise
            shapes = f"q {tuple(call.q.shape)} {call.q.dtype}, k {tuple(call.k.shape)}"
            raise ValueError(
                f"torch's {kernel.name} kernel refuses {shapes} on {call.q.device.type}: {text}"
            ) from error

    return run


def _repeated(x: Tensor, call: DenseCall) -> Tensor:
    return x.repeat_interleave(call.repeats, 1) if call.repeats > 1 else x


# ----- packages


def _xformers(call: DenseCall) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    bias = None
    if call.causal:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    elif call.allowed is not None:
        rows, keys = call.q.shape[2], call.k.shape[2]
        # Its kernels read the bias in runs of 8.
        hidden = pad(~call.allowed.expand(*call.q.shape[:2], rows, keys), (0, -keys % 8))
        bias = torch.zeros(hidden.shape, dtype=call.q.dtype, device=call.q.device)
        bias = bias.masked_fill_(hidden, HIDDEN)[..., :keys]
    q, k, v = (x.transpose(1, 2) for x in (call.q, _repeated(call.k, call), _repeated(call.v, call)))
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=call.scale).transpose(1, 2)


def _flash_attn(call: DenseCall) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    # Since 2.1 its causal mask, too, is aligned at the end.
    return flash_attn_func(q, k, v, softmax_scale=call.scale, causal=call.causal).transpose(1, 2)


# ----- who can do what


def _on_cuda(package: str | None = None, install: str = "") -> Callable[[str], list[str]]:
    def refusals(device: str) -> list[str]:
        reasons = []
        if package is not None and find_spec(package) is None:
            reasons.append(f"package {package} is not installed; {install}")
        if device != "cuda":
            reasons.append("it needs a CUDA device")
        return reasons

    return refusals


def _takes(dtypes: tuple[torch.dtype, ...], *, mask: bool) -> Callable[[DenseCall], list[str]]:
    def refusals(call: DenseCall) -> list[str]:
        reasons = []
        if call.q.dtype not in dtypes:
            names = ", ".join(str(x).removeprefix("torch.") for x in dtypes)
            reasons.append(f"it computes in {names}, not {str(call.q.dtype).removeprefix('torch.')}")
        if call.allowed is not None and not mask:
            reasons.append("it takes no mask (padding, or keys that no query may see)")
        return reasons

    return refusals


def _flash_takes(call: DenseCall) -> list[str]:
    """On the CPU torch's flash kernel takes everything."""
    if call.q.device.type == "cpu":
        return []
    reasons = _takes(HALF, mask=False)(call)
    if call.causal and not call.square:
        reasons.append("it takes no causal call with more keys than queries")
    return reasons


_CUDA = "pip install 'astbench[cuda]'"
_BACKENDS = {
    backend.name: backend
    for backend in (
        DenseBackend(
            "sdpa_math",
            "plain matmuls and softmax, O(N x M) memory",
            _torch_kernel(SDPBackend.MATH),
            lambda device: [],
            lambda call: [],
        ),
        DenseBackend(
            "sdpa_flash",
            "torch's flash kernel; on CUDA float16 and bfloat16 without masks",
            _torch_kernel(SDPBackend.FLASH_ATTENTION),
            lambda device: [] if device in ("cpu", "cuda") else ["it needs a CPU or a CUDA device"],
            _flash_takes,
        ),
        DenseBackend(
            "sdpa_efficient",
            "torch's memory-efficient kernel",
            _torch_kernel(SDPBackend.EFFICIENT_ATTENTION),
            _on_cuda(),
            _takes((*HALF, torch.float32), mask=True),
        ),
        DenseBackend(
            "sdpa_cudnn",
            "torch's cuDNN kernel, float16 and bfloat16",
            _torch_kernel(SDPBackend.CUDNN_ATTENTION),
            _on_cuda(),
            _takes(HALF, mask=True),
        ),
        DenseBackend(
            "xformers",
            "xformers.ops.memory_efficient_attention",
            _xformers,
            _on_cuda("xformers", _CUDA),
            _takes((*HALF, torch.float32), mask=True),
        ),
        DenseBackend(
            "flash_attn",
            "flash_attn.flash_attn_func, float16 and bfloat16 without masks",
            _flash_attn,
            _on_cuda("flash_attn", _CUDA),
            _takes(HALF, mask=False),
        ),
    )
}
