"""Sparse Query Attention against the paper's layer, written out with its own, smaller projections."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from tests.oracles import BATCH, DIM, HIDDEN, PATTERNS, normalised, visible
from tests.registry.building import build

HEADS = 12
SIZES = [(6, 3), (4, 2), (3, 3), (4, 12), (6, 12), (1, 4), (12, 4)]  # query heads, the model's key/value heads


def sqa(query_heads, kv_heads, heads=HEADS):
    return build("sqa", {"num_query_heads": query_heads}, heads=heads, kv_heads=kv_heads)


def normal(*shape, g):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def heads_of(x, weight):
    """`(batch, n, HIDDEN)` -> `(batch, heads, n, DIM)`."""
    return (x @ weight.T).unflatten(-1, (-1, DIM)).transpose(1, 2)


def sqa_layer(x, y, w_q, w_k, w_v, w_o, allowed):
    """The paper's layer: H_q query heads, H_kv key heads each repeated H_q / H_kv times, head by head."""
    q, k, v = heads_of(x, w_q), heads_of(y, w_k), heads_of(y, w_v)
    repeats = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):
        logits = q[:, head] @ k[:, head // repeats].transpose(1, 2) * DIM**-0.5
        outputs.append(normalised(torch.where(allowed, logits.exp(), 0.0)) @ v[:, head // repeats])
    return torch.cat(outputs, -1) @ w_o.T


def mean_slices(weight, heads):
    """Rows of a projection: the mean of each run of consecutive heads."""
    return weight.view(heads, -1, DIM, HIDDEN).mean(1).flatten(0, 1)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("query_heads", "kv_heads"), SIZES)
@pytest.mark.parametrize("length", [1, 63, 127])
def test_it_is_the_papers_layer_with_merged_projections(length, query_heads, kv_heads, pattern, padding):
    g = torch.Generator().manual_seed(length)
    keys = length if pattern.endswith("self") else 73
    x = normal(BATCH, length, HIDDEN, g=g)
    y = x if pattern.endswith("self") else normal(BATCH, keys, HIDDEN, g=g)
    w_q, w_k, w_v = (normal(h * DIM, HIDDEN, g=g) / 2 for h in (HEADS, kv_heads, kv_heads))
    w_o = normal(HIDDEN, HEADS * DIM, g=g)
    weights = [w.requires_grad_() for w in (w_q, w_k, w_v, w_o)]
    valid = torch.rand(BATCH, keys, generator=g) >= padding if padding else None
    allowed = visible(length, keys, pattern, valid)[:, 0]

    left = min(query_heads, kv_heads)
    merged_o = w_o.view(HIDDEN, query_heads, -1, DIM).sum(2).flatten(1)
    expected = sqa_layer(
        x, y, mean_slices(w_q, query_heads), mean_slices(w_k, left), mean_slices(w_v, left), merged_o, allowed
    )
    mask = AttentionMask(pattern, key_valid=valid)
    out = sqa(query_heads, kv_heads)(heads_of(x, w_q), heads_of(y, w_k), heads_of(y, w_v), mask).out
    # A padded query's row is nobody's.
    out, expected = mask.real_queries(out), mask.real_queries(expected[:, None])[:, 0]
    got = out.transpose(1, 2).flatten(2) @ w_o.T
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    weight = normal(*got.shape, g=g)
    pairs = [torch.autograd.grad((z * weight).sum(), weights) for z in (got, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_all_heads_it_is_dense(pattern):
    g = torch.Generator().manual_seed(0)
    q, k, v = (normal(BATCH, h, 40, DIM, g=g) for h in (HEADS, 4, 4))
    dense = build_attention("dense", {}, AttentionShape(HEADS, 4, DIM))
    mask = AttentionMask(pattern)
    assert torch.equal(sqa(HEADS, 4)(q, k, v, mask).out, dense(q, k, v, mask).out)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padding", [0.0, 0.3])
def test_every_visible_key_is_attended_to(pattern, padding):
    size, g = 41, torch.Generator().manual_seed(0)
    q, k = (normal(BATCH, h, size, size, g=g) for h in (HEADS, 4))
    valid = torch.rand(BATCH, size, generator=g) >= padding
    module = build_attention("sqa", {}, AttentionShape(HEADS, 4, size))
    mask = AttentionMask(pattern, key_valid=valid)
    eye = torch.eye(size, dtype=torch.float64).expand_as(k)
    out = module(q, k, eye, mask, context=AttentionContext(collect_stats=True))
    allowed = visible(size, size, pattern, valid)
    assert torch.equal(out.out > 0, allowed.expand_as(out.out))
    assert torch.equal(out.stats.attended, allowed.sum((-1, -2)).double().expand(-1, HEADS))


@pytest.mark.parametrize(("query_heads", "kv_heads"), SIZES)
def test_flops_are_what_the_counter_sees(query_heads, kv_heads):
    g = torch.Generator().manual_seed(0)
    q, k, v = normal(BATCH, HEADS, 37, DIM, g=g), *(normal(BATCH, kv_heads, 53, DIM, g=g) for _ in range(2))
    mask, module = AttentionMask("bidirectional_cross"), sqa(query_heads, kv_heads)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(q, k, v, mask)
    assert module.flops(BATCH, 37, 53, mask) == counter.get_total_flops()
    assert module.state_size(53) == 2 * min(query_heads, kv_heads) * 53 * DIM


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"), [(12, 12, 6), (12, 4, 4), (2, 2, 1), (1, 1, 1), (9, 3, 3), (32, 8, 16)]
)
def test_the_default_is_half_of_the_heads_or_the_next_that_fits(heads, kv_heads, expected):
    assert sqa(None, kv_heads, heads).num_query_heads == expected


def test_heads_that_do_not_fit_are_refused():
    message = "--attention.num_query_heads must be one of 1, 2, 4, 12 for 12 heads and 4 key/value heads, got 6"
    with pytest.raises(ValueError, match=message):
        sqa(6, 4)
    with pytest.raises(ValueError, match=r"--attention.num_query_heads must be at least 1 head, got 0"):
        sqa(0, 4)
