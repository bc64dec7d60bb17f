"""Selective Self-Attention against its equations, token by token."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 5
PATTERNS = ["bidirectional_self", "causal_self"]
OPTIONS = [
    {},
    {"token": False, "value": False},
    {"position": False, "value": False},
    {"token": False, "position": False},
]


def build(options=None, *, trained=True, dim=DIM, kv_heads=KV_HEADS):
    module = build_attention("ssa", options or {}, AttentionShape(HEADS, kv_heads, dim)).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters() if trained else ():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return module


def draw(length, *, dim=DIM, padding=0.0, grad=False):
    g = torch.Generator().manual_seed(length)
    tensors = [torch.randn(BATCH, h, length, dim, generator=g, dtype=torch.float64) for h in (HEADS, 3, 3)]
    valid = torch.rand(BATCH, length, generator=g) >= padding if padding else None
    return [x.requires_grad_(grad) for x in tensors], valid


def written_out(module, q, k, v, pattern, valid, scale):
    """One query of one head after the other."""
    length = q.shape[2]
    valid = torch.ones(BATCH, length, dtype=torch.bool) if valid is None else valid
    rows = []
    for b in range(BATCH):
        for head in range(HEADS):
            keys, values = k[b, head // 2], v[b, head // 2]
            if module.w_v is not None:
                f_v = torch.nn.functional.gelu(values) @ module.w_v[head // 2]
                values = values * (1 + torch.tanh(f_v))[:, None]
            for i in range(length):
                seen = [j for j in range(length) if valid[b, j] and (j <= i or pattern == PATTERNS[0])]
                if not seen:
                    rows.append(q[b, head, i] * 0)
                    continue
                tau = torch.ones((), dtype=q.dtype)
                if module.w_q is not None and valid[b, i]:
                    tau = tau + torch.tanh(torch.nn.functional.gelu(q[b, head, i]) @ module.w_q[head])
                if module.alpha is not None:
                    start = 1 / (1 + math.exp(2.0))
                    tau = tau + (1 / (1 + torch.exp(-module.alpha)) - start) * math.log(len(seen))
                logits = keys[seen] @ q[b, head, i] * tau * scale
                rows.append(torch.softmax(logits, 0) @ values[seen])
    return torch.stack(rows).view(BATCH, HEADS, length, DIM)


def real_rows(out, valid):
    return out if valid is None else out * valid[:, None, :, None]


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x) or "all")
@pytest.mark.parametrize("length", [1, 31])
def test_it_is_the_equations_written_out(length, options, pattern, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    module = build(options)
    expected = real_rows(written_out(module, *tensors, pattern, valid, 0.37), valid)
    got = real_rows(module(*tensors, AttentionMask(pattern, key_valid=valid), scale=0.37).out, valid)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    sources = [*tensors, *module.parameters()]
    pairs = [
        torch.autograd.grad((x * weight).sum(), sources, allow_unused=True, materialize_grads=True)
        for x in (got, expected)
    ]
    torch.testing.assert_close(*pairs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_untrained_it_is_dense_bit_for_bit(pattern, padding, dtype):
    tensors, valid = draw(127, padding=padding)
    tensors = [x.to(dtype) for x in tensors]
    mask = AttentionMask(pattern, key_valid=valid)
    dense = build_attention("dense", {}, AttentionShape(HEADS, KV_HEADS, DIM))
    got = real_rows(build(trained=False).to(dtype)(*tensors, mask).out, valid)
    assert torch.equal(got, real_rows(dense(*tensors, mask).out, valid))


def test_a_larger_alpha_sharpens_long_contexts_only():
    """The weight of the best key grows with alpha where many keys are seen, and not where one is."""
    (q, k, _), _ = draw(64, dim=64)
    eye = torch.eye(64, dtype=torch.float64).expand_as(k)
    best = []
    for alpha in (-2.0, 3.0):
        module = build({"token": False, "value": False}, dim=64)
        with torch.no_grad():
            module.alpha.fill_(alpha)
        best.append(module(q, k, eye, AttentionMask("causal_self")).out.amax(-1))
    assert torch.equal(best[0][..., 0], best[1][..., 0])
    assert (best[1][..., 32:] > best[0][..., 32:]).all()


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_visible_key_is_attended_to(pattern, padding):
    (q, k, _), valid = draw(41, dim=41, padding=padding)
    mask = AttentionMask(pattern, key_valid=valid)
    eye = torch.eye(41, dtype=torch.float64).expand_as(k)
    out = build(dim=41)(q, k, eye, mask, context=AttentionContext(collect_stats=True))
    allowed = torch.ones(41, 41, dtype=torch.bool)
    allowed = allowed.tril() if pattern == "causal_self" else allowed
    allowed = (allowed[None, None] if valid is None else allowed & valid[:, None, None]).expand_as(out.out)
    rows = real_rows(torch.ones_like(allowed), valid)
    assert torch.equal((out.out > 0) & rows, allowed & rows)
    assert torch.equal(out.stats.attended, allowed.sum((-1, -2)).double())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nan_in_padded_queries_does_not_reach_the_parameters(pattern):
    tensors, valid = draw(20, padding=0.3)
    tensors = [torch.where(valid[:, None, :, None], x, torch.nan) for x in tensors]
    module = build()
    out = real_rows(module(*tensors, AttentionMask(pattern, key_valid=valid)).out, valid)
    grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_flops_are_what_the_counter_sees(pattern):
    tensors, _ = draw(37)
    mask, module = AttentionMask(pattern), build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, 37, 37, mask) == counter.get_total_flops()


def test_without_any_temperature_there_is_nothing_to_do():
    with pytest.raises(ValueError, match=r"--attention.token must be true, unless position or value is, got False"):
        build({"token": False, "position": False, "value": False})
