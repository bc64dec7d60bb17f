"""AST's token for what was not chosen, against a softmax written out row by row."""

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.block_selection import Call
from tests.oracles import BATCH, draw
from tests.registry.building import build

HEADS, KV_HEADS, TOKENS, DIM, SIZE = 4, 2, 61, 8, 4
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}


def ast(**options):
    options = {"block_size": SIZE, "min_blocks": 1, "density": 0.3, "rest": True, **options}
    return build("ast", options, **SIZES)


def written_out(module, q, k, v, mask, keep):
    """Blocks that may be known and are neither kept nor always kept: one token of their predicted mass."""
    call = Call.of(module.shape, q, k, v, mask).without_padding()
    selection = module.selection(call)
    scores = module.scores(call, selection)
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool) if mask.key_valid is None else mask.key_valid
    out = torch.zeros_like(q)
    rows = 0
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in (BATCH, HEADS, TOKENS))).tolist():
        group, kv = row // selection.query_group, h * KV_HEADS // HEADS
        may = selection.candidates.expand(BATCH, 1, -1, -1)[b, 0, group]
        members = [[t for t in range(n * SIZE, min(TOKENS, (n + 1) * SIZE)) if real[b, t]] for n in range(len(may))]
        seen = [t for n in range(len(may)) if keep[b, h, group, n] for t in members[n] if not mask.causal or t <= row]
        left = [n for n in range(len(may)) if may[n] and not keep[b, h, group, n]]
        known = [t for n in range(len(may)) if may[n] for t in members[n]]
        logits = [q[b, h, row] @ k[b, kv, t] * DIM**-0.5 for t in seen]
        values = [v[b, kv, t] for t in seen]
        if left:
            parts = scores[b, h, group, left]
            if module.config.sub_blocks == 1:
                parts = parts + torch.tensor([len(members[n]) for n in left]).double().log()
            logits.append(parts.logsumexp(0))
            values.append(v[b, kv, known].mean(0))
            rows += 1
        if logits:
            out[b, h, row] = torch.stack(logits).softmax(0) @ torch.stack(values)
    assert rows > BATCH * HEADS * TOKENS // 3, "many rows leave something"
    return out


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("causal_self", {"query_group": 1}),
        ("causal_self", {"query_group": 4}),
        ("causal_self", {"query_group": 1, "sub_blocks": 2}),
        ("causal_self", {"query_group": 1, "budget": "adaptive", "share": 0.1}),
        ("bidirectional_self", {"query_group": 8}),
        ("causal_cross", {"query_group": 1}),
    ],
)
def test_one_token_stands_for_the_rest(pattern, options, padding):
    (q, k, v), _ = draw(TOKENS, **SIZES)
    valid = None
    if padding:
        valid = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7
        valid[:, 16:20] = False  # a block that is all padding
        valid[:, 0] = True  # blocks count from the first real token
    mask = AttentionMask(pattern, 0, valid)
    module = ast(**options).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    out = module(q, k, v, mask, context=AttentionContext(collect_stats=True))
    keep = out.stats.layout.to_mask()
    expected = written_out(module, q, k, v, mask, keep)
    rows = slice(None)
    if padding and pattern != "causal_cross":
        rows = valid[:, None, :].expand(BATCH, HEADS, TOKENS)
    torch.testing.assert_close(out.out[rows], expected[rows], rtol=1e-9, atol=1e-9)
    without = ast(**{**options, "rest": False}).eval()
    without.load_state_dict(module.state_dict())
    assert not torch.allclose(without(q, k, v, mask).out[rows], expected[rows], atol=1e-3)


def test_all_kept_leaves_nothing():
    (q, k, v), _ = draw(TOKENS, **SIZES)
    mask = AttentionMask("causal_self")
    out = ast(density=1.0)(q, k, v, mask, context=AttentionContext(collect_stats=True))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.out, dense, rtol=1e-9, atol=1e-9)
    assert float(out.stats.coarse.sum()) == 0


def test_the_task_reaches_the_predictor_through_it():
    (q, k, v), _ = draw(TOKENS, **SIZES)
    module = ast(estimator="none", distill_weight=0.0).train()
    module(q, k, v, AttentionMask("causal_self")).out.square().sum().backward()
    assert module.key_weight.grad.abs().sum() > 0 and module.gain.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_it_counts_as_one_pair_a_row():
    (q, k, v), _ = draw(TOKENS, **SIZES)
    mask = AttentionMask("causal_self")
    with_rest, without = (
        ast(rest=rest).eval()(q, k, v, mask, context=AttentionContext(collect_stats=True)).stats
        for rest in (True, False)
    )
    more = (with_rest.density - without.density) * TOKENS * (TOKENS + 1) / 2
    assert (more > 0.5 * TOKENS).all() and (more < TOKENS).all()
