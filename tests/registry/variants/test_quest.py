"""Quest against its equations, channel by channel."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from tests import oracles
from tests.oracles import BATCH, HEADS, KV_HEADS, PATTERNS, assert_same, real_keys, softmax_attention
from tests.registry.building import build

DIM = 7
draw = partial(oracles.draw, dim=DIM, seed=None, grad=True)


def quest(*, layer=2, **options):
    return build("quest", options, dim=DIM, layer=layer)


def upper_bound(query, keys):
    """sum_i max(q_i m_i, q_i M_i), one channel after the other."""
    columns = zip(query.tolist(), keys.T.tolist(), strict=True)
    return sum(max(x * min(column), x * max(column)) for x, column in columns if column)


def pairs(q, k, pattern, valid, size, top_k):
    """Who sees whom by algorithm 1: the own page has the score infinity, a future one is not there."""
    length, total = q.shape[2], k.shape[2]
    valid = real_keys(valid, k)
    allowed = torch.zeros(BATCH, HEADS, length, total, dtype=torch.bool)
    for b in range(BATCH):
        real = [[j for j in range(start, min(total, start + size)) if valid[b, j]] for start in range(0, total, size)]
        for head in range(HEADS):
            bounds = [[upper_bound(q[b, head, i], k[b, head // 2, keys]) for i in range(length)] for keys in real]
            for i in range(length):
                scores = {}
                for page, keys in enumerate(real):
                    own = pattern.endswith("self") and page == i // size
                    if keys and not (pattern == "causal_self" and page > i // size):
                        scores[page] = float("inf") if own else bounds[page][i]
                for page in sorted(scores, key=scores.get, reverse=True)[:top_k]:
                    allowed[b, head, i, [j for j in real[page] if j <= i or pattern != "causal_self"]] = True
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
    got = quest(block_size=size, top_k=top_k)(*tensors, mask, scale=0.37).out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors, gradients=1e-12)


def test_no_key_of_a_page_exceeds_its_bound():
    (q, k, v), _ = draw(43, 43)
    module, mask = quest(block_size=5), AttentionMask("bidirectional_self")
    call = Call.of(module.shape, q, k, v, mask, 1.0)
    bound = module.scores(call, module.selection(call)).detach()
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).detach()
    largest = torch.nn.functional.pad(logits, (0, 2), value=-torch.inf).unflatten(-1, (9, 5)).amax(-1)
    assert (largest <= bound + 1e-12).all()


def test_the_first_two_layers_are_dense_attention():
    (q, k, v), valid = draw(43, 43, padding=0.2)
    mask = AttentionMask("causal_self", key_valid=valid)
    dense = build_attention("dense", {}, AttentionShape(HEADS, KV_HEADS, DIM))(q, k, v, mask).out
    for layer in (0, 1, 2):
        run = quest(layer=layer, block_size=5, top_k=3)(q, k, v, mask, context=AttentionContext(collect_stats=True))
        assert torch.equal(run.out, dense) == (layer < 2)
        assert bool((run.stats.density == 1).all()) == (layer < 2)
        assert torch.equal(
            run.stats.layout.attended_pairs(causal=True, key_valid=valid).expand(-1, HEADS), run.stats.attended
        )
        flops = quest(layer=layer, block_size=5, top_k=3).flops(BATCH, 43, 43, mask)
        assert (flops == 4 * BATCH * HEADS * 43 * 43 * DIM) == (layer < 2)


def test_scores_cost_what_the_counter_sees():
    (q, k, v), _ = draw(43, 43)
    mask, module = AttentionMask("causal_self"), quest(block_size=5, top_k=3)
    call = Call.of(module.shape, q, k, v, mask)
    selection = module.selection(call)
    with FlopCounterMode(display=False) as counter:
        module.scores(call, selection)
    kept = 4 * BATCH * HEADS * DIM * module.selector.kept_keys(43, 43, mask)
    assert module.flops(BATCH, 43, 43, mask) - kept == counter.get_total_flops()


def test_options_are_the_papers():
    with pytest.raises(ValueError, match="top_k must be at least 1 block, got 0"):
        quest(top_k=0)
    with pytest.raises(ValueError, match="sink_block"):
        quest(sink_block=True)
