"""MoBA against its equations, query by query."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from astbench_registry.variants.pooled_topk import PooledTopKAttention
from tests import oracles
from tests.oracles import BATCH, HEADS, KV_HEADS, PATTERNS, assert_same, real_keys, softmax_attention
from tests.registry.building import build

DIM = 7
draw = partial(oracles.draw, dim=DIM, seed=None, grad=True)


def moba(**options):
    return build("moba", options, dim=DIM)


def pairs(q, k, pattern, valid, size, top_k):
    """Who sees whom by equations 5 and 6: the own block has the score infinity, a future one is not there."""
    length, total = q.shape[2], k.shape[2]
    valid = real_keys(valid, k)
    allowed = torch.zeros(BATCH, HEADS, length, total, dtype=torch.bool)
    for b in range(BATCH):
        real = [[j for j in range(start, min(total, start + size)) if valid[b, j]] for start in range(0, total, size)]
        for head in range(HEADS):
            agreement = [(q[b, head] @ k[b, head // 2, keys].mean(0)).tolist() for keys in real]
            for i in range(length):
                scores = {}
                for block, keys in enumerate(real):
                    own = pattern.endswith("self") and block == i // size
                    if keys and not (pattern == "causal_self" and block > i // size):
                        scores[block] = float("inf") if own else agreement[block][i]
                for block in sorted(scores, key=scores.get, reverse=True)[:top_k]:
                    allowed[b, head, i, [j for j in real[block] if j <= i or pattern != "causal_self"]] = True
    return allowed


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("length", "size", "top_k"), [(1, 4, 2), (43, 5, 3), (37, 8, 1)])
def test_it_is_the_equations_written_out(length, size, top_k, pattern, padding):
    keys = length if pattern.endswith("self") else length + 10
    tensors, valid = draw(length, keys, padding=padding)
    mask = AttentionMask(pattern, key_valid=valid)
    with torch.no_grad():
        allowed = pairs(*tensors[:2], pattern, valid, size, top_k)
    expected = softmax_attention(*tensors, allowed, 0.37)
    got = moba(block_size=size, top_k=top_k)(*tensors, mask, scale=0.37).out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors, gradients=1e-12)


def test_one_block_is_the_own_one():
    (q, k, v), _ = draw(43, 43)
    out = moba(block_size=5, top_k=1)(
        q, k, v, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True)
    )
    own = torch.eye(9, dtype=torch.bool)[torch.arange(43) // 5]
    assert torch.equal(out.stats.layout.to_mask(), own.expand(BATCH, HEADS, -1, -1))


def test_the_first_block_has_to_earn_its_place():
    """What `pooled_topk` keeps for its own sake, MoBA does not."""
    (q, k, v), _ = draw(43, 43)
    with torch.no_grad():
        k[:, :, :5] = -q[:, ::2, 42:] * 10
    run = moba(block_size=5, top_k=3)(
        q, k, v, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True)
    )
    assert not run.stats.layout.to_mask()[:, ::2, 42, 0].any()


def test_every_token_chooses_under_all_patterns():
    (q, k, v), _ = draw(130, 130)
    pooled = {"block_size": 5, "top_k": 4, "min_blocks": 1, "query_group": 1, "sink_block": False}
    control = build_attention("pooled_topk", pooled, AttentionShape(HEADS, KV_HEADS, DIM))
    assert isinstance(control, PooledTopKAttention)
    for pattern in ("bidirectional_self", "causal_self"):
        mask = AttentionMask(pattern)
        ours = moba(block_size=5, top_k=4)(q, k, v, mask).out
        torch.testing.assert_close(ours, control(q, k, v, mask).out, rtol=0, atol=1e-12)


def test_scores_cost_what_the_counter_sees():
    (q, k, v), _ = draw(43, 43)
    mask, module = AttentionMask("causal_self"), moba(block_size=5, top_k=3)
    call = Call.of(module.shape, q, k, v, mask)
    selection = module.selection(call)
    with FlopCounterMode(display=False) as counter:
        module.scores(call, selection)
    kept = 4 * BATCH * HEADS * DIM * module.selector.kept_keys(43, 43, mask)
    assert module.flops(BATCH, 43, 43, mask) - kept == counter.get_total_flops()


def test_options_are_the_papers():
    with pytest.raises(ValueError, match="top_k must be at least 1 block, got 0"):
        moba(top_k=0)
    with pytest.raises(ValueError, match="sink_block"):
        moba(sink_block=True)
