"""DeepSeek sparse attention against its equations, token by token, and what its indexer learns."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from tests import oracles
from tests.oracles import (
    BATCH,
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SELF,
    assert_same,
    attention_weights,
    real_keys,
    softmax_attention,
    visible,
)
from tests.registry.building import build

OPTIONS = {"top_k": 8, "index_heads": 4, "index_dim": 3}
draw = partial(oracles.draw, hidden=HIDDEN, seed=None, grad=True)


def dsa(*, train=False, **options):
    return build("dsa", {**OPTIONS, **options}, hidden=HIDDEN, train=train)


def index_scores(module, hidden):
    """Equation 1, index head after index head: `(batch, length, length)`."""
    heads, width = module.config.index_heads, module.config.index_dim
    key, total = hidden @ module.index_key.weight.T, 0.0
    for j in range(heads):
        query = hidden @ module.index_query.weight[j * width : (j + 1) * width].T
        weight = hidden @ module.index_weight.weight[j]
        total = total + weight[:, :, None] * torch.clamp(query @ key.transpose(1, 2), min=0)
    return total / (heads * width) ** 0.5


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("length", [1, 41])
def test_it_is_the_equations_written_out(length, pattern, padding):
    (*tensors, hidden), valid = draw(length, padding=padding)
    module, seen = dsa(), visible(length, length, pattern, valid).expand(BATCH, -1, -1, -1)
    scores = index_scores(module, hidden).tolist()
    allowed = torch.zeros(BATCH, HEADS, length, length, dtype=torch.bool)
    for b in range(BATCH):
        for t in range(length):
            candidates = [s for s in range(length) if seen[b, 0, t, s]]
            allowed[b, :, t, sorted(candidates, key=lambda s: -scores[b][t][s])[:8]] = True
    mask = AttentionMask(pattern, key_valid=valid)
    run = module(*tensors, mask, scale=0.37, context=AttentionContext(collect_stats=True, hidden_states=hidden))
    got, expected = (mask.real_queries(x) for x in (run.out, softmax_attention(*tensors, allowed, 0.37)))
    assert_same(got, expected, tensors, gradients=1e-12)
    assert torch.equal(run.stats.attended, allowed.sum((2, 3)).double())


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", SELF)
def test_the_loss_is_the_divergence_from_the_heads_attention(pattern, padding):
    (*tensors, hidden), valid = draw(41, padding=padding)
    module, allowed = dsa(train=True, distill_weight=0.7), visible(41, 41, pattern, valid).expand(BATCH, -1, -1, -1)
    weights = attention_weights(*tensors[:2], allowed).detach().sum(1)
    scores, divergences, real = index_scores(module, hidden), [], real_keys(valid, tensors[1])
    for b in range(BATCH):
        for t in range(41):
            seen = [s for s in range(41) if allowed[b, 0, t, s]]
            if real[b, t] and len(seen) > 1:
                target = weights[b, t, seen] / weights[b, t, seen].sum()
                divergences.append((target * (target.log() - scores[b, t, seen].log_softmax(0))).sum())
    expected = 0.7 * torch.stack(divergences).mean()
    mask = AttentionMask(pattern, key_valid=valid)
    got = module(*tensors, mask, context=AttentionContext(hidden_states=hidden)).losses["distill"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(x, list(module.parameters())) for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", SELF)
def test_training_is_dense_and_the_loss_leaves_the_backbone_alone(pattern):
    (*tensors, hidden), valid = draw(41, padding=0.2)
    mask = AttentionMask(pattern, key_valid=valid)
    dense = build_attention("dense", {}, AttentionShape(HEADS, KV_HEADS, DIM))(*tensors, mask).out
    out = dsa(train=True)(*tensors, mask, context=AttentionContext(collect_stats=True, hidden_states=hidden))
    assert torch.equal(out.out, dense) and (out.stats.density == 1).all()
    assert torch.autograd.grad(out.losses["distill"], [*tensors, hidden], allow_unused=True) == (None,) * 4


def test_distillation_teaches_the_tokens_of_most_mass():
    """Queries and keys are linear in the layer's input, as in a model; the indexer has to find that out.

    One channel is the same for all tokens. Without it w(-h) = -w(h), so a dot product, relu(x) - relu(-x), is out of
    reach, and the indexer learns nothing.
    """
    g = torch.Generator().manual_seed(1)
    maps = [torch.randn(HIDDEN, HIDDEN, generator=g, dtype=torch.float64) * 0.7 for _ in range(2)]
    torch.manual_seed(0)
    module = build_attention(
        "dsa", {**OPTIONS, "index_dim": 7}, AttentionShape(1, 1, HIDDEN, hidden_size=HIDDEN)
    ).double()
    mask, optimizer = AttentionMask("causal_self"), torch.optim.Adam(module.parameters(), lr=0.02)

    def inputs(seed):
        hidden = torch.randn(3, 48, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hidden[..., 0] = 2
        return [(hidden @ x)[:, None] for x in maps], AttentionContext(collect_stats=True, hidden_states=hidden)

    def mass():
        (q, k), context = inputs(999)
        kept = module.eval()(q, k, k, mask, context=context).stats.layout.token_mask(causal=True)
        weights = (q @ k.transpose(-1, -2) * HIDDEN**-0.5).masked_fill(~torch.ones(48, 48).tril().bool(), -torch.inf)
        return float((weights.softmax(-1) * kept)[:, :, 16:].sum(-1).mean())

    before = mass()
    for step in range(100):
        (q, k), context = inputs(step)
        optimizer.zero_grad()
        module.train()(q, k, k, mask, context=context).losses["distill"].backward()
        optimizer.step()
    after = mass()
    assert after > before + 0.4, f"attention mass on the chosen tokens went from {before:.2f} to {after:.2f}"


def test_flops_are_what_the_counter_sees_beside_the_kernel_call():
    (q, k, _, hidden), _ = draw(41)
    module, mask = dsa(), AttentionMask("causal_self")
    with FlopCounterMode(display=False) as counter:
        module.index_scores(Call.of(module.shape, q, k, k, mask, context=AttentionContext(hidden_states=hidden)))
    kernel = 4 * BATCH * HEADS * DIM * module.selector.kept_keys(41, 41, mask)
    assert module.flops(BATCH, 41, 41, mask) == counter.get_total_flops() + kernel


def test_decoding_with_a_cache_is_refused_with_the_reason():
    (q, k, v, hidden), _ = draw(41)
    mask, context = AttentionMask("causal_self", query_offset=40), AttentionContext(hidden_states=hidden[:, 40:])
    with pytest.raises(ValueError, match="input for all 41 tokens, got 1: it cannot decode with a cache"):
        dsa()(q[:, :, 40:], k, v, mask, context=context)
