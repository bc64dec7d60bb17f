"""DeepSeek sparse attention against its equations, token by token, and what its indexer learns."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call

BATCH, HEADS, KV_HEADS, DIM, HIDDEN = 2, 6, 3, 5, 7
OPTIONS = {"top_k": 8, "index_heads": 4, "index_dim": 3}
PATTERNS = ["causal_self", "bidirectional_self"]


def build(*, train=False, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = AttentionShape(HEADS, KV_HEADS, DIM, hidden_size=HIDDEN)
        return build_attention("dsa", {**OPTIONS, **options}, shape).double().train(train)


def draw(length, *, padding=0.0):
    g = torch.Generator().manual_seed(length)
    sizes = (HEADS, length), (KV_HEADS, length), (KV_HEADS, length)
    tensors = [torch.randn(BATCH, h, n, DIM, generator=g, dtype=torch.float64) for h, n in sizes]
    hidden = torch.randn(BATCH, length, HIDDEN, generator=g, dtype=torch.float64)
    return [x.requires_grad_() for x in tensors], hidden, torch.rand(BATCH, length, generator=g) >= padding


def softmax_over(q, k, v, allowed, scale):
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    weights = torch.where(allowed, (q @ k.transpose(-1, -2) * scale).exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return weights @ v, weights


def visible_pairs(length, pattern, valid):
    allowed = torch.ones(length, length, dtype=torch.bool)
    return (allowed.tril() if pattern == "causal_self" else allowed) & valid[:, None, None, :]


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
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 41])
def test_it_is_the_equations_written_out(length, pattern, padding):
    tensors, hidden, valid = draw(length, padding=padding)
    module, visible = build(), visible_pairs(length, pattern, valid)
    scores = index_scores(module, hidden).tolist()
    allowed = torch.zeros(BATCH, HEADS, length, length, dtype=torch.bool)
    for b in range(BATCH):
        for t in range(length):
            seen = [s for s in range(length) if visible[b, 0, t, s]]
            allowed[b, :, t, sorted(seen, key=lambda s: -scores[b][t][s])[:8]] = True
    mask = AttentionMask(pattern, key_valid=valid if padding else None)
    run = module(*tensors, mask, scale=0.37, context=AttentionContext(collect_stats=True, hidden_states=hidden))
    got, expected = (mask.real_queries(x) for x in (run.out, softmax_over(*tensors, allowed, 0.37)[0]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(run.stats.attended, allowed.sum((2, 3)).double())
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    gradients = [torch.autograd.grad((x * weight).sum(), tensors) for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_loss_is_the_divergence_from_the_heads_attention(pattern, padding):
    tensors, hidden, valid = draw(41, padding=padding)
    module, visible = build(train=True, distill_weight=0.7), visible_pairs(41, pattern, valid)
    weights = softmax_over(*tensors, visible, DIM**-0.5)[1].detach().sum(1)
    scores, divergences = index_scores(module, hidden), []
    for b in range(BATCH):
        for t in range(41):
            seen = [s for s in range(41) if visible[b, 0, t, s]]
            if valid[b, t] and len(seen) > 1:
                target = weights[b, t, seen] / weights[b, t, seen].sum()
                divergences.append((target * (target.log() - scores[b, t, seen].log_softmax(0))).sum())
    expected = 0.7 * torch.stack(divergences).mean()
    mask = AttentionMask(pattern, key_valid=valid if padding else None)
    got = module(*tensors, mask, context=AttentionContext(hidden_states=hidden)).losses["distill"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(x, list(module.parameters())) for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_is_dense_and_the_loss_leaves_the_backbone_alone(pattern):
    tensors, hidden, valid = draw(41, padding=0.2)
    mask = AttentionMask(pattern, key_valid=valid)
    dense = build_attention("dense", {}, AttentionShape(HEADS, KV_HEADS, DIM))(*tensors, mask).out
    hidden.requires_grad_()
    out = build(train=True)(*tensors, mask, context=AttentionContext(collect_stats=True, hidden_states=hidden))
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
    (q, k, _), hidden, _ = draw(41)
    module, mask = build(), AttentionMask("causal_self")
    with FlopCounterMode(display=False) as counter:
        module.index_scores(Call.of(module.shape, q, k, k, mask, context=AttentionContext(hidden_states=hidden)))
    kernel = 4 * BATCH * HEADS * DIM * module.selector.kept_keys(41, 41, mask)
    assert module.flops(BATCH, 41, 41, mask) == counter.get_total_flops() + kernel


def test_decoding_with_a_cache_is_refused_with_the_reason():
    (q, k, v), hidden, _ = draw(41)
    mask, context = AttentionMask("causal_self", query_offset=40), AttentionContext(hidden_states=hidden[:, 40:])
    with pytest.raises(ValueError, match="input for all 41 tokens, got 1: it cannot decode with a cache"):
        build()(q[:, :, 40:], k, v, mask, context=context)
