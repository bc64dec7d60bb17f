"""AST's adaptive budget against softmax written out row by row, and what its regulariser moves."""

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask
from tests.oracles import BATCH, draw
from tests.registry.building import build

HEADS, KV_HEADS, TOKENS, DIM, SIZE = 4, 2, 61, 8, 4
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}


def ast(**options):
    options = {"block_size": SIZE, "query_group": 1, "budget": "adaptive", "min_blocks": 2, **options}
    return build("ast", options, **SIZES, dtype=torch.float32)


def inputs(size=2.0):
    (q, k, v), _ = draw(TOKENS, **SIZES)
    return q * size, k, v


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
    q, k, v = inputs()
    module = ast(share=share, min_blocks=least)
    out = module(q, k, v, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True))
    keep = out.stats.layout.to_mask()
    counts = set()
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in (BATCH, HEADS, TOKENS))).tolist():
        wanted = expected_blocks(q[b, h], k[b, h * KV_HEADS // HEADS], row, share, least)
        assert set(keep[b, h, row].nonzero().flatten().tolist()) == wanted, (b, h, row)
        counts.add(len(wanted) if row == TOKENS - 1 else 0)
    assert len(counts) > 2 or share == 0.9, "heads differ in how much they keep"


def step(module, tokens):
    """(density that was kept, the regulariser's loss) of one call."""
    out = module(*tokens, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True))
    visible = torch.arange(TOKENS).div(SIZE, rounding_mode="floor") + 1
    return float((out.stats.layout.counts / visible).mean()), out.losses["density"]


@pytest.mark.parametrize("share", [0.3, 0.1, 0.03])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_prediction_is_what_is_kept(share, scale):
    options = {"density": 1e-6, "lambda_density": 1.0, "distill_weight": 0.0, "temperature": 0.05}
    module = ast(share=share, **options).train()
    kept, loss = step(module, inputs(scale))
    assert float(loss.detach()) ** 0.5 == pytest.approx(kept, abs=0.03)


@pytest.mark.parametrize(("share", "target"), [(0.05, 0.35), (0.2, 0.7)], ids=["less", "more"])
def test_the_regulariser_moves_the_density_to_its_target(share, target):
    tokens = inputs(0.7)
    options = {"density": target, "lambda_density": 1.0, "distill_weight": 0.0, "estimator": "none"}
    module = ast(share=share, **options).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    kept = []
    for _ in range(120):
        density, loss = step(module, tokens)
        kept.append(density)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(kept[-1] - target) < 0.5 * abs(kept[0] - target), (kept[0], kept[-1])
    assert abs(kept[0] - target) > 0.1


def test_runs_of_before_still_load():
    assert ast(budget="fixed", mass=0.9).config.mass == 0.9
    with pytest.raises(ValueError, match=r"--attention.mass must be left out: .* by --attention.share"):
        ast(mass=0.9)


def test_the_regulariser_of_a_batch_that_sees_nothing_is_finite():
    module = ast(lambda_density=1.0)
    mask = AttentionMask("causal_self", 0, torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    out = module.train()(*(x.float() for x in inputs()), mask)
    assert sum(out.losses.values()).isfinite()


def test_a_schedule_from_dense_keeps_gradients_finite_where_no_choice_is_soft():
    options = {"budget": "fixed", "temperature": 0.05, "density_start": 1.0, "density_steps": 100, "min_blocks": 1}
    module = ast(**options).train()
    q, k, v = (x.float() for x in inputs(16.0))
    module(q, k, v, AttentionMask("causal_self"), context=AttentionContext(step=0)).out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
