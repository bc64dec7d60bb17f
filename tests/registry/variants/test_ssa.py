"""Selective Self-Attention against its equations, token by token."""

import math
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from tests import oracles
from tests.oracles import BATCH, DIM, HEADS, KV_HEADS, SELF, assert_same, real_keys, visible
from tests.registry import building

build = partial(building.build, "ssa", weights=1.0, seed=3)
draw = partial(oracles.draw, seed=None)
OPTIONS = [
    {},
    {"token": False, "value": False},
    {"position": False, "value": False},
    {"token": False, "position": False},
]


def written_out(module, q, k, v, pattern, valid, scale):
    """One query of one head after the other."""
    length = q.shape[2]
    valid = real_keys(valid, k)
    rows = []
    for b in range(BATCH):
        for head in range(HEADS):
            keys, values = k[b, head // 2], v[b, head // 2]
            if module.w_v is not None:
                f_v = torch.nn.functional.gelu(values) @ module.w_v[head // 2]
                values = values * (1 + torch.tanh(f_v))[:, None]
            for i in range(length):
                seen = [j for j in range(length) if valid[b, j] and (j <= i or pattern == SELF[0])]
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
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x) or "all")
@pytest.mark.parametrize("length", [1, 31])
def test_it_is_the_equations_written_out(length, options, pattern, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    module = build(options)
    expected = real_rows(written_out(module, *tensors, pattern, valid, 0.37), valid)
    got = real_rows(module(*tensors, AttentionMask(pattern, key_valid=valid), scale=0.37).out, valid)
    assert_same(got, expected, [*tensors, *module.parameters()], rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", SELF)
def test_untrained_it_is_dense_bit_for_bit(pattern, padding, dtype):
    tensors, valid = draw(127, padding=padding)
    tensors = [x.to(dtype) for x in tensors]
    mask = AttentionMask(pattern, key_valid=valid)
    dense = build_attention("dense", {}, AttentionShape(HEADS, KV_HEADS, DIM))
    got = real_rows(build(weights=None).to(dtype)(*tensors, mask).out, valid)
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
@pytest.mark.parametrize("pattern", SELF)
def test_every_visible_key_is_attended_to(pattern, padding):
    (q, k, _), valid = draw(41, dim=41, padding=padding)
    mask = AttentionMask(pattern, key_valid=valid)
    eye = torch.eye(41, dtype=torch.float64).expand_as(k)
    out = build(dim=41)(q, k, eye, mask, context=AttentionContext(collect_stats=True))
    allowed = visible(41, 41, pattern, valid).expand_as(out.out)
    rows = real_rows(torch.ones_like(allowed), valid)
    assert torch.equal((out.out > 0) & rows, allowed & rows)
    assert torch.equal(out.stats.attended, allowed.sum((-1, -2)).double())


@pytest.mark.parametrize("pattern", SELF)
def test_flops_are_what_the_counter_sees(pattern):
    tensors, _ = draw(37)
    mask, module = AttentionMask(pattern), build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, 37, 37, mask) == counter.get_total_flops()


def test_without_any_temperature_there_is_nothing_to_do():
    with pytest.raises(ValueError, match=r"--attention.token must be true, unless position or value is, got False"):
        build({"token": False, "position": False, "value": False})
