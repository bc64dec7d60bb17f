"""Vertical-slash attention against its definition, pair by pair."""

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from tests.oracles import BATCH, HEADS, assert_same, attention_weights, draw, real_keys, softmax_attention, visible
from tests.registry.building import build

OPTIONS = {"block_size": 3, "query_group": 4, "vertical": 3, "slash": 4, "last_queries": 7, "first": 1, "recent": 2}


def minference(**options):
    return build("minference", {**OPTIONS, **options})


def draw_large(length, *, padding=0.0):
    """Twice as large, so that columns and diagonals differ."""
    tensors, valid = draw(length, padding=padding, seed=None)
    return [(2 * x).requires_grad_() for x in tensors], valid


def kept_pairs(weights, valid, config):
    """From the dense weights of all rows: columns and diagonals of the last real ones, then the blocks they touch."""
    length = valid.shape[1]
    allowed = torch.zeros(BATCH, HEADS, length, length, dtype=torch.bool)
    for b in range(BATCH):
        last = [i for i in range(length) if valid[b, i]][-config.last_queries :]
        for head in range(HEADS):
            column = {j: float("inf") if j < config.first else 0.0 for j in range(length)}
            diagonal = {n: float("inf") if n < config.recent else 0.0 for n in range(length)}
            for i in last:
                for j in range(i + 1):
                    column[j] += weights[b, head, i, j].item()
                    diagonal[i - j] += weights[b, head, i, j].item()
            columns = [j for j in sorted(column, key=column.get, reverse=True)[: config.vertical] if column[j]]
            diagonals = [n for n in sorted(diagonal, key=diagonal.get, reverse=True)[: config.slash] if diagonal[n]]
            for i in range(length):
                start = i // config.query_group * config.query_group
                blocks = {j // config.block_size for j in columns}
                for row in range(start, start + config.query_group):
                    blocks |= {(row - n) // config.block_size for n in diagonals if row >= n}
                for block in blocks:
                    allowed[b, head, i, block * config.block_size : (block + 1) * config.block_size] = True
    return allowed


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, {}),
        (5, {"first": 0, "recent": 1}),
        (47, {}),
        (50, {"query_group": 1}),
        (52, {"block_size": 8, "query_group": 2}),
    ],
    ids=["one-token", "shorter-than-the-estimate", "plain", "row-by-row", "blocks-longer-than-groups"],
)
def test_it_is_the_definition_written_out(length, options, padding):
    tensors, valid = draw_large(length, padding=padding)
    module = minference(**options)
    seen = visible(length, length, "causal_self", valid)
    with torch.no_grad():
        weights = attention_weights(*tensors[:2], seen, 0.37)
        allowed = kept_pairs(weights, real_keys(valid, tensors[1]), module.config) & seen
    mask = AttentionMask("causal_self", key_valid=valid)
    run = module(*tensors, mask, scale=0.37, context=AttentionContext(collect_stats=True))
    got, expected = (mask.real_queries(x) for x in (run.out, softmax_attention(*tensors, allowed, 0.37)))
    assert_same(got, expected, tensors)
    if length > 40:
        assert run.stats.density.max() < 0.9, "the case must leave something out"


def test_a_planted_column_and_a_planted_diagonal_are_found():
    length, column, distance = 64, 10, 21
    q = torch.eye(length, dtype=torch.float64)[None, None] * 30
    k = torch.eye(length, dtype=torch.float64).roll(distance, 1)[None, None]  # key j agrees with query j + distance
    k[..., column, :] = 1
    options = {"vertical": 1, "slash": 1, "first": 0, "recent": 1, "block_size": 1, "query_group": 1}
    for number, diagonals in ((1, {0}), (2, {0, distance})):
        module = build_attention("minference", {**OPTIONS, **options, "slash": number}, AttentionShape(1, 1, length))
        run = module(q, k, k, AttentionMask("causal_self"), scale=1.0, context=AttentionContext(collect_stats=True))
        position = torch.arange(length)
        expected = (position == column) | torch.isin(position[:, None] - position, torch.tensor(sorted(diagonals)))
        assert torch.equal(run.stats.layout.token_mask(causal=True)[0, 0], expected.tril())


def test_the_end_of_the_prompt_chooses_for_its_start():
    (q, k, v), _ = draw_large(47)
    mask, context, module = AttentionMask("causal_self"), AttentionContext(collect_stats=True), minference()
    later = torch.cat([q[:, :, :40], -q[:, :, 40:]], 2)
    before, after = (module(x, k, v, mask, context=context).stats.layout.to_mask() for x in (q, later))
    assert not torch.equal(before[:, :, :9], after[:, :, :9])
    assert not module.config.can.strictly_causal and not module.config.can.decode


def test_options_that_name_nothing_are_refused():
    with pytest.raises(ValueError, match="recent must be at least 1 distance: a token sees itself, got 0"):
        minference(recent=0)
