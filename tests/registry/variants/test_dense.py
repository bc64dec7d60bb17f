"""Dense attention's backends: what runs is what was asked for, what cannot is refused with its reasons."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from astbench_kernels import dense
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.registry import make_config
from tests import oracles
from tests.oracles import PATTERNS, assert_same, softmax_attention, visible
from tests.registry.building import build

draw = partial(oracles.draw, seed=None)
ON_CPU = ["sdpa_math", "sdpa_flash"]
# The conformance suite runs those of the CPU; the others must say why they cannot.
ELSEWHERE = {
    "sdpa_efficient": ["it needs a CUDA device"],
    "sdpa_cudnn": ["it needs a CUDA device"],
    "xformers": ["package xformers is not installed; pip install 'astbench[cuda]'", "it needs a CUDA device"],
    "flash_attn": ["package flash_attn is not installed; pip install 'astbench[cuda]'", "it needs a CUDA device"],
}


@pytest.fixture(autouse=True)
def bare_cpu(monkeypatch):
    """Whatever this machine has: no CUDA, no packages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dense, "find_spec", lambda name: None)


def dense_on(backend):
    return build("dense", {"backend": backend})


def written_out(q, k, v, pattern, valid, offset=0):
    return softmax_attention(q, k, v, visible(q.shape[2], k.shape[2], pattern, valid, offset), 0.37)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("length", [1, 63, 127])
def test_torch_kernels_are_softmax_written_out(length, backend, pattern, padding):
    tensors, valid = draw(length, None if pattern.endswith("self") else 73, padding=padding, grad=True)
    mask = AttentionMask(pattern, key_valid=valid)
    expected = written_out(*tensors, pattern, valid)
    out = dense_on(backend)(*tensors, mask, scale=0.37, context=AttentionContext(collect_stats=True))
    assert out.stats.backend == f"{backend}-cpu"
    got = out.out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors, gradients=1e-12)


class Called(TorchDispatchMode):
    """Names of the operators that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "flash"), [("sdpa_flash", True), ("sdpa_math", False), ("auto", True)])
def test_the_named_kernel_is_the_one_that_runs(backend, flash):
    tensors, _ = draw(16)
    with Called() as called:
        dense_on(backend)(*tensors, AttentionMask())
    ran_flash = any("flash_attention" in name for name in called.names)
    assert (ran_flash, "aten::_softmax" in called.names or any("safe_softmax" in n for n in called.names)) == (
        flash,
        not flash,
    )


@pytest.mark.parametrize(("backend", "reasons"), ELSEWHERE.items(), ids=ELSEWHERE)
def test_what_cannot_run_here_is_refused_when_built(backend, reasons):
    with pytest.raises(ValueError) as error:
        dense_on(backend)
    assert str(error.value) == (
        f"attention 'dense' with --attention.backend={backend}: backend '{backend}' cannot run on cpu: "
        f"{'; '.join(reasons)} (here run: auto, sdpa_math, sdpa_flash)"
    )


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"--attention.backend must be one of auto, sdpa_flash, .*, got 'sdpa'"):
        dense_on("sdpa")


def call(q, k, v, **changes):
    return dense.DenseCall(q, k, v, **{"allowed": None, "causal": False, "scale": 0.5, **changes})


def test_calls_that_a_backend_cannot_serve_are_refused_with_all_reasons():
    (q, k, v), _ = draw(8)
    masked = call(q, k, v, allowed=torch.ones(8, 8, dtype=torch.bool))
    refusals = {name: b.call_refusals(masked) for name, b in dense.dense_backends().items()}
    no_mask = "it takes no mask (padding, or keys that no query may see)"
    assert refusals == {
        "sdpa_math": [],
        "sdpa_flash": [],
        "sdpa_efficient": ["it computes in float16, bfloat16, float32, not float64"],
        "sdpa_cudnn": ["it computes in float16, bfloat16, not float64"],
        "xformers": ["it computes in float16, bfloat16, float32, not float64"],
        "flash_attn": ["it computes in float16, bfloat16, not float64", no_mask],
    }


def test_a_call_that_torch_refuses_is_no_other_kernels_call():
    """On the CPU torch has no memory-efficient kernel: it must not answer with another one."""
    (q, k, v), _ = draw(8)
    with pytest.raises(ValueError, match=r"torch's EFFICIENT_ATTENTION kernel refuses q .*float64"):
        dense._torch_kernel(SDPBackend.EFFICIENT_ATTENTION)(call(q, k, v))


def test_the_capability_record_shrinks_with_the_backend(monkeypatch):
    def can(backend):
        return make_config("dense", {"backend": backend}).can

    assert can("auto") == can("sdpa_math") == replace(can("sdpa_flash"), any_value_size=True)
    assert can("auto").any_value_size and not can("sdpa_flash").any_value_size
    assert "float64" not in can("xformers").dtypes and can("xformers").padding
    assert can("flash_attn").dtypes == ("bfloat16", "float16") and not can("flash_attn").padding
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not can("sdpa_flash").padding and not can("sdpa_flash").decode


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("dense", {"backend": "auto"}, "torch on cpu"),
        ("dense", {"backend": "sdpa_math"}, "sdpa_math on cpu (asked for)"),
        ("local", {}, "torch on cpu"),
        ("ast", {"backend": "auto"}, "gather (auto)"),
        ("ast", {"backend": "reference"}, "reference (asked for)"),
    ],
)
def test_the_head_of_a_run_names_the_backend(name, options, line):
    attention = build_attention(name, options, AttentionShape(2, 2, 8))
    assert attention.planned_backend(torch.device("cpu")) == line


# ----- packages that want a GPU, in their place functions of the same signature written from their documentation


def documented_attention(q, k, v, scale, allowed):
    """Tensors `(batch, length, heads, dim)`; `allowed` bool or an additive bias."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    logits = logits.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else logits + allowed
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


class FromBottomRight:
    """xformers' LowerTriangularFromBottomRightMask."""


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert query.shape[2] == key.shape[2] == value.shape[2], "heads must be as many (else five dimensions)"
    rows, keys = query.shape[1], key.shape[1]
    if attn_bias is None or isinstance(attn_bias, FromBottomRight):
        everything = torch.ones(rows, keys, dtype=torch.bool)
        bias = everything if attn_bias is None else everything.tril(keys - rows)
    else:
        assert attn_bias.shape == (query.shape[0], query.shape[2], rows, keys) and attn_bias.dtype == query.dtype
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1]), "rows must start at multiples of 8"
        bias = attn_bias
    return documented_attention(query, key, value, scale, bias)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    rows, keys = q.shape[1], k.shape[1]
    allowed = torch.ones(rows, keys, dtype=torch.bool)
    return documented_attention(q, k, v, softmax_scale, allowed.tril(keys - rows) if causal else allowed)


def in_place_of(monkeypatch, backend):
    """The package as documented, and the backend let loose on the CPU in float64."""
    if backend == "xformers":
        ops = ModuleType("xformers.ops")
        ops.memory_efficient_attention = memory_efficient_attention
        ops.fmha = SimpleNamespace(attn_bias=SimpleNamespace(LowerTriangularFromBottomRightMask=FromBottomRight))
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    else:
        package = ModuleType("flash_attn")
        package.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    real = dense._BACKENDS[backend]
    free = dense.DenseBackend(backend, "", real.run, lambda device: [], lambda call: [])
    monkeypatch.setitem(dense._BACKENDS, backend, free)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["xformers", "flash_attn"])
def test_packages_are_called_as_documented(monkeypatch, backend, pattern, padding):
    if backend == "flash_attn" and padding:
        pytest.skip("flash_attn_func takes no padding mask")
    in_place_of(monkeypatch, backend)
    queries, keys = (29, 29) if pattern == "bidirectional_self" else (21, 37)
    offset = keys - queries if pattern == "causal_self" else 0
    tensors, valid = draw(queries, keys, padding=padding)
    mask = AttentionMask(pattern, query_offset=offset, key_valid=valid)
    got = dense_on(backend)(*tensors, mask, scale=0.37).out
    expected = written_out(*tensors, pattern, valid, offset)
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_rows_that_see_nothing_are_zero_for_xformers(monkeypatch):
    in_place_of(monkeypatch, "xformers")
    tensors, valid = draw(12, padding=0.3, grad=True)
    valid[0], valid[1, :2] = False, False
    out = dense_on("xformers")(*tensors, AttentionMask("causal_self", key_valid=valid)).out
    assert not out[0].any() and not out[1, :, :2].any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "xformers", "flash_attn"])
def test_on_a_gpu(monkeypatch, backend):
    monkeypatch.undo()
    reasons = dense.dense_backends()[backend].device_refusals("cuda" if torch.cuda.is_available() else "cpu")
    if reasons:
        pytest.skip("; ".join(reasons))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 200, 64, generator=g).half() for h in (6, 3, 3))
    for pattern in ("bidirectional_self", "causal_self"):
        expected = dense_on("sdpa_math")(q.double(), k.double(), v.double(), AttentionMask(pattern)).out
        got = dense_on(backend)(q.cuda(), k.cuda(), v.cuda(), AttentionMask(pattern)).out
        error = (got.cpu().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 2e-3
