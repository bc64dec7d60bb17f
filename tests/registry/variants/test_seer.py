"""SeerAttention against its equations, gate by gate, and what its gates learn."""

from functools import partial

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.registry import make_config
from tests import oracles
from tests.oracles import BATCH, PATTERNS, attention_weights, real_keys, softmax_attention, visible
from tests.registry.building import build

HEADS, KV_HEADS, DIM, WIDTH, SIZE = 4, 2, 7, 6, 5
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}
draw = partial(oracles.draw, **SIZES, seed=None)


def seer(train=False, **options):
    return build("seer", {"block_size": SIZE, "gate_dim": WIDTH, **options}, **SIZES, train=train)


def gates(module, q, k, pattern, valid, group):
    """For each (sequence, head, group): the own blocks, the group's rows, and block -> gate over the others."""
    length, total = q.shape[2], k.shape[2]
    for b in range(BATCH):
        real = [[j for j in range(x, min(total, x + SIZE)) if valid[b, j]] for x in range(0, total, SIZE)]
        for head in range(HEADS):
            inside = [k[b, head // 2, keys] for keys in real if keys]
            features = torch.stack([torch.cat([x.amax(0), x.amin(0), x.mean(0)]) for x in inside])
            key = dict(
                zip([n for n, keys in enumerate(real) if keys], features @ module.key_gate[head // 2], strict=True)
            )
            for start in range(0, length, group):
                rows = range(start, min(length, start + group))
                speaking = [i for i in rows if pattern.endswith("cross") or valid[b, i]]
                query = q[b, head, speaking].sum(0) / max(1, len(speaking)) @ module.query_gate[head]
                seen = [n for n in key if pattern != "causal_self" or n * SIZE <= rows[-1]]
                stands_in = {i // SIZE for i in range(start, start + group)} if pattern.endswith("self") else set()
                free = [n for n in seen if n not in stands_in]
                logits = torch.stack([key[n] for n in free]) @ query * WIDTH**-0.5 if free else torch.zeros(0)
                yield (
                    b,
                    head,
                    rows,
                    [n for n in seen if n in stands_in],
                    dict(zip(free, logits.softmax(0), strict=True)),
                )


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("budget", [{"top_k": 4}, {"threshold": 0.3}], ids=["top-k", "threshold"])
def test_it_is_the_equations_written_out(budget, pattern, group, padding):
    length, keys = (28, 28) if pattern.endswith("self") else (19, 29)
    (q, k, v), valid = draw(length, keys, padding=padding)
    real = real_keys(valid, k)
    module = seer(query_group=group, **budget)
    allowed = torch.zeros(BATCH, HEADS, length, keys, dtype=torch.bool)
    left_out = 0
    for b, head, rows, own, gate in gates(module, q, k, pattern, real, group):
        best = sorted(gate, key=lambda block: -gate[block].item())
        if "top_k" in budget:
            kept = own + best[: max(0, 4 - len(own))]
        else:
            kept = own + [block for block in best if gate[block] >= 0.3]
            kept = kept or best[:1]  # min_blocks
        left_out += len(own) + len(best) - len(kept)
        for i in rows:
            for block in kept:
                allowed[b, head, i, block * SIZE : (block + 1) * SIZE] = True
    assert left_out
    allowed &= visible(length, keys, pattern, valid)
    mask = AttentionMask(pattern, key_valid=valid)
    got, expected = module(q, k, v, mask).out, softmax_attention(q, k, v, allowed)
    torch.testing.assert_close(mask.real_queries(got), mask.real_queries(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_loss_is_the_divergence_from_pooled_attention(pattern, group, padding):
    length, keys = (28, 28) if pattern.endswith("self") else (19, 29)
    (q, k, v), valid = draw(length, keys, padding=padding)
    real = real_keys(valid, k)
    module = seer(train=True, query_group=group, distill_weight=0.7)
    attention = attention_weights(q, k, visible(length, keys, pattern, valid))
    divergences = []
    for b, head, rows, _, gate in gates(module, q, k, pattern, real, group):
        rows = [i for i in rows if pattern.endswith("cross") or real[b, i]]
        if len(gate) < 2 or not rows:
            continue
        mass = torch.stack([attention[b, head, rows, n * SIZE : (n + 1) * SIZE].amax() for n in gate])
        if mass.sum():
            target = mass / mass.sum()
            divergences.append((target * (target / torch.stack(list(gate.values()))).log()).sum())
    expected = 0.7 * torch.stack(divergences).mean()
    mask = AttentionMask(pattern, key_valid=valid)
    got = module(q, k, v, mask).losses["distill"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    pairs = [torch.autograd.grad(x, list(module.parameters())) for x in (got, expected)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_is_dense_and_the_loss_leaves_the_backbone_alone(pattern):
    (q, k, v), valid = draw(33, 33, padding=0.2)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = AttentionMask(pattern, key_valid=valid)
    dense = build_attention("dense", {}, AttentionShape(HEADS, KV_HEADS, DIM))(q, k, v, mask).out
    module = seer(train=True, top_k=2)
    out = module(q, k, v, mask, context=AttentionContext(collect_stats=True))
    assert torch.equal(out.out, dense) and (out.stats.density == 1).all()
    assert torch.autograd.grad(out.losses["distill"], [q, k, v], allow_unused=True) == (None,) * 3
    module.eval()
    assert not torch.equal(module(q, k, v, mask).out, dense)


def test_a_pooled_group_looks_ahead_and_says_so():
    (q, k, v), _ = draw(40, 40)
    mask, context = AttentionMask("causal_self"), AttentionContext(collect_stats=True)
    later = q.clone()
    later[:, :, 39] *= -50  # the last query of the last group of eight
    for group in (1, 8):
        module = seer(query_group=group, top_k=4)
        before, after = (
            module(x, k, v, mask, context=context).stats.layout.token_mask(causal=True) for x in (q, later)
        )
        same = torch.equal(before[:, :, :39], after[:, :, :39])
        assert same == module.config.can.strictly_causal == (group == 1)
    assert make_config("seer", {}).can.strictly_causal and make_config("seer", {}).can.decode


def planted(seed, *, blocks=12):
    """One key of each query's needle block matches it, and its other keys cancel it in the mean."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.randint(0, 2, (3, blocks, 4), generator=g).double() * 2 - 1
    needle = torch.randint(0, blocks, (3, blocks * SIZE), generator=g)
    k = torch.randn(3, blocks, SIZE, 4, generator=g, dtype=torch.float64) * 0.1 - 3 * direction[:, :, None] / (SIZE - 1)
    k[:, :, 2] = 3 * direction
    q = direction.take_along_dim(needle[..., None], 1)
    return q[:, None], k.flatten(1, 2)[:, None], torch.randn(3, 1, blocks * SIZE, 4, generator=g, dtype=torch.float64)


def test_distillation_teaches_the_blocks_of_most_mass():
    shape, mask = AttentionShape(1, 1, 4), AttentionMask("bidirectional_cross")
    options = {"block_size": SIZE, "query_group": 1, "top_k": 3}
    torch.manual_seed(0)
    module = build_attention("seer", options, shape).double()
    oracle = build_attention("oracle_topk", {**options, "min_blocks": 1, "sink_block": False}, shape).double()
    held_out, context = planted(999), AttentionContext(collect_stats=True)

    def recall():
        kept = [m.eval()(*held_out, mask, context=context).stats.layout.to_mask() for m in (module, oracle)]
        return float((kept[0] & kept[1]).sum() / kept[1].sum())

    before, optimizer = recall(), torch.optim.Adam(module.parameters(), lr=0.03)
    for step in range(80):
        optimizer.zero_grad()
        module.train()(*planted(step), mask).losses["distill"].backward()
        optimizer.step()
    after = recall()
    assert after > before + 0.3, f"recall of the oracle's blocks went from {before:.2f} to {after:.2f}"


def test_gates_that_nothing_teaches_are_refused():
    with pytest.raises(ValueError, match="distill_weight must be above 0: nothing else teaches the gate, got 0"):
        seer(distill_weight=0)
