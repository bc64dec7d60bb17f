"""AST's adaptive budget against softmax written out row by row, and what its regulariser moves."""

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention

BATCH, HEADS, KV_HEADS, TOKENS, DIM, SIZE = 2, 4, 2, 61, 8, 4


def build(**options):
    options = {"block_size": SIZE, "query_group": 1, "budget": "adaptive", "min_blocks": 2, **options}
    return build_attention("ast", options, AttentionShape(HEADS, KV_HEADS, DIM))


def draw(scale=2.0):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, n, TOKENS, DIM, generator=g, dtype=torch.float64) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q * scale, k, v


def expected_blocks(q, k, row, share, least):
    """The first block, the current one, those in between with the share, and the best until there are enough."""
    current = row // SIZE
    means = k[: (len(k) // SIZE) * SIZE].view(-1, SIZE, DIM).mean(1)
    logits = {block: float(q[row] @ means[block]) * DIM**-0.5 for block in range(1, current)}
    total = sum(torch.tensor(list(logits.values()), dtype=torch.float64).exp().tolist())
    ranked = sorted(logits, key=logits.get, reverse=True)
    enough = [block for block in ranked if torch.tensor(logits[block]).double().exp() / total >= share]
    missing = max(0, least - len({0, current})) - len(enough)
    return {0, current, *enough, *ranked[len(enough) : len(enough) + max(0, missing)]}


@pytest.mark.parametrize(("share", "least"), [(0.15, 2), (0.02, 5), (0.9, 1)])
def test_blocks_with_their_share_are_kept(share, least):
    q, k, v = draw()
    module = build(share=share, min_blocks=least)
    out = module(q, k, v, AttentionMask("causal_self"), context=AttentionContext(listen=True))
    keep = out.stats.layout.to_mask()
    counts = set()
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in (BATCH, HEADS, TOKENS))).tolist():
        wanted = expected_blocks(q[b, h], k[b, h * KV_HEADS // HEADS], row, share, least)
        assert set(keep[b, h, row].nonzero().flatten().tolist()) == wanted, (b, h, row)
        counts.add(len(wanted) if row == TOKENS - 1 else 0)
    assert len(counts) > 2 or share == 0.9, "heads differ in how much they keep"


def test_the_regulariser_sharpens_what_is_too_dense():
    """Following its gradient alone, the effective number of blocks falls, and with it what is kept."""
    q, k, v = draw(0.5)
    mask, listen = AttentionMask("causal_self"), AttentionContext(listen=True)
    module = build(share=0.1, density=0.2, lambda_density=1.0, distill_weight=0.0, estimator="none").train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    kept = []
    for _ in range(40):
        out = module(q, k, v, mask, context=listen)
        kept.append(float(out.stats.layout.counts.double().mean()))
        loss = sum(out.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert kept[-1] < 0.8 * kept[0]
