"""Padding in front of sequences: outputs, losses, statistics and kept state are those of the sequences without it."""

from dataclasses import replace

import pytest
import torch

from astbench_registry import AttentionContext
from astbench_registry.leading_padding import attended_tokens, leading_padding, roll
from astbench_registry.mask import AttentionMask
from tests.oracles import BATCH, HIDDEN, PATTERNS, SELF, draw
from tests.registry.building import build

LENGTH = 61
AST = {"block_size": 4, "min_blocks": 2, "density": 0.3}
FRONTS = [(1, 0), (3, 3), (4, 17), (37, 0)]  # a block is 4 tokens


def in_front(fronts, length=LENGTH):
    return torch.arange(length) >= torch.tensor(fronts)[:, None]


def layer(**options):
    return build("ast", {**AST, **options}, hidden=HIDDEN, weights=0.5, train=False)


def test_counts_what_lies_in_front_and_nothing_else():
    valid = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert leading_padding(valid).tolist() == [2, 0, 0]
    assert leading_padding(valid[1:]) is None
    assert leading_padding(None) is None
    assert leading_padding(valid[:0]) is None


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("fronts", FRONTS)
def test_statistics_are_those_of_the_sequence_alone(pattern, fronts):
    (q, k, v), _ = draw(LENGTH)
    module, context = layer(query_group=4), AttentionContext(collect_stats=True)
    mask = AttentionMask(pattern, key_valid=in_front(fronts))
    with torch.no_grad():
        stats = module(q, k, v, mask, context=context).stats
    pairs = attended_tokens(stats, mask)
    for row, front in enumerate(fronts):
        one = [x[row : row + 1, :, front:] for x in (q, k, v)]
        alone = module(*one, AttentionMask(pattern), context=context).stats
        assert torch.equal(alone.layout.token_mask(causal=mask.causal)[0], pairs[row, :, front:, front:])
        if mask.causal:  # without that, padded queries see the keys, and are counted
            assert torch.equal(alone.attended[0], stats.attended[row]) and alone.visible[0] == stats.visible[row]
            assert not pairs[row, :, :front].any()
        assert not pairs[row, ..., :front].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_reach_the_same_tokens_as_without(pattern):
    tensors, _ = draw(LENGTH, grad=True)
    front, module = 17, layer()
    cross = pattern.endswith("cross")
    module(*tensors, AttentionMask(pattern, key_valid=in_front((front, front)))).out[
        :, :, front:
    ].square().sum().backward()
    cut = [x.detach()[:, :, 0 if cross and i == 0 else front :].requires_grad_() for i, x in enumerate(tensors)]
    module(*cut, AttentionMask(pattern)).out[:, :, front if cross else 0 :].square().sum().backward()
    for i, (whole, part) in enumerate(zip(tensors, cut, strict=True)):
        start = 0 if cross and i == 0 else front
        torch.testing.assert_close(whole.grad[:, :, start:], part.grad, rtol=0, atol=1e-10)
        assert not whole.grad[:, :, :start].any()


@pytest.mark.parametrize("name", ["ast", "seer", "dsa"])
def test_training_learns_from_the_same_rows_wherever_the_padding_lies(name):
    """Losses are means over the rows of all sequences: the shorter of two does not weigh as much as the longer."""
    (q, k, v, hidden), _ = draw(LENGTH, hidden=HIDDEN, grad=True)
    options = {"ast": {**AST, "distill_fraction": 1.0}, "seer": {"block_size": 4, "density": 0.3}, "dsa": {"top_k": 9}}
    module = build(name, options[name], hidden=HIDDEN, weights=0.5)
    fronts = (41, 4)
    forth = roll(torch.tensor(fronts), LENGTH)
    behind = [x.take_along_dim(forth[:, None, :, None], 2) for x in (q, k, v)]
    moved = hidden.take_along_dim(forth[..., None], 1)
    found = []
    for tensors, rows, valid in (
        ((q, k, v), hidden, in_front(fronts)),
        (behind, moved, in_front(fronts).gather(1, forth)),
    ):
        context = AttentionContext(hidden_states=rows)
        got = module(*tensors, AttentionMask("causal_self", key_valid=valid), context=context)
        module.zero_grad()
        sum(got.losses.values()).backward(retain_graph=True)
        found.append((got.losses, [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    (losses, grads), (wanted, wanted_grads) = found
    assert losses and losses.keys() == wanted.keys() and grads
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss)
    for grad, one in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, one)


def test_rows_in_front_get_zeros_with_and_without_gradients():
    (q, k, v), _ = draw(LENGTH, grad=True)
    module, mask = layer(), AttentionMask("causal_self", key_valid=in_front((17, 4)))
    got = module(q, k, v, mask).out
    with torch.no_grad():
        torch.testing.assert_close(got, module(q, k, v, mask).out, rtol=0, atol=1e-10)
    assert not got[0, :, :17].any() and not got[1, :, :4].any()


def test_the_layers_input_and_named_tokens_move_along():
    (q, k, v, hidden), _ = draw(LENGTH, hidden=HIDDEN)
    named = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    named[:, 29] = True
    front = 17
    for name, options in (("synthesizer", {}), ("ast", {**AST, "global_tokens": True})):
        module = build(name, options, hidden=HIDDEN, longest=LENGTH, weights=0.5, train=False)
        context = AttentionContext(hidden_states=hidden, global_tokens=named)
        whole = module(q, k, v, AttentionMask(key_valid=in_front((front, front))), context=context).out
        cut = replace(context, hidden_states=hidden[:, front:], global_tokens=named[:, front:])
        alone = module(*(x[:, :, front:] for x in (q, k, v)), AttentionMask(), context=cut).out
        torch.testing.assert_close(whole[:, :, front:], alone, rtol=0, atol=1e-10)
    assert named[:, 29].all()


def test_a_step_of_decoding_without_a_layout_still_counts():
    (q, k, v), _ = draw(LENGTH)
    module, context = layer(), AttentionContext(collect_stats=True)
    mask = AttentionMask("causal_self", query_offset=LENGTH - 1, key_valid=in_front((17, 4)))
    got = module(q[:, :, -1:], k, v, mask, context=context)
    assert got.stats.layout is None and got.stats.visible.tolist() == [LENGTH - 17, LENGTH - 4]
    whole = module(q, k, v, replace(mask, query_offset=0)).out
    torch.testing.assert_close(got.out, whole[:, :, -1:], rtol=0, atol=1e-10)


def test_what_is_kept_of_a_cache_is_kept_of_each_padding():
    """The second step must not compute anew what the first one kept: it sees other keys and does not notice."""
    (q, k, v), _ = draw(LENGTH)
    module, mask = layer(), AttentionMask("causal_self", key_valid=in_front((17, 4)))
    state = module.new_cache_state()
    step = replace(mask, query_offset=LENGTH - 1)
    with torch.no_grad():
        first = module(q, k, v, mask, context=AttentionContext(summaries=state)).out
        assert sorted(part.blocks for part in state.parts.values()) == [(LENGTH - 18) // 4, (LENGTH - 5) // 4]
        other = k.clone()
        other[:, :, :40] = torch.nan
        kept = module(q[:, :, -1:], k, v, step, context=AttentionContext(summaries=state)).out
        torch.testing.assert_close(kept, first[:, :, -1:], rtol=0, atol=1e-10)


def test_rows_that_are_all_padding_are_zero():
    (q, k, v), _ = draw(LENGTH)
    valid = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    valid[1, 40:] = True
    module = layer()
    for offset, rows in ((0, slice(0, 40)), (20, slice(20, 30))):
        mask = AttentionMask("causal_self", query_offset=offset, key_valid=valid[:, : rows.stop] if offset else valid)
        keys = rows.stop if offset else LENGTH
        got = module(q[:, :, rows.start : keys], k[:, :, :keys], v[:, :, :keys], mask).out
        assert not got[0].any() and not got[1, :, : 40 - offset].any()
