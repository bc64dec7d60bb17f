"""Summaries of blocks kept over the calls of a decode: no result changes, and nothing is computed twice."""

import pytest
import torch

from astbench_registry import build_attention
from astbench_registry.block_selection.summaries import BlockSummaries
from astbench_registry.interface import AttentionContext, AttentionShape
from astbench_registry.mask import AttentionMask
from tests.oracles import HEADS, KV_HEADS, draw

DIM, TOKENS, SIZE = 8, 45, 4
OPTIONS = {
    "ast": {"min_blocks": 2, "density": 0.3, "block_size": SIZE, "sub_blocks": 2, "patterns": 2},
    "pooled_topk": {"min_blocks": 2, "density": 0.3, "block_size": SIZE},
    "quest": {"top_k": 3, "block_size": SIZE, "dense_layers": 0},
    "moba": {"top_k": 3, "block_size": SIZE},
}


def layer(name):
    """The layer, and the number of blocks in each call of its `block_features`."""
    torch.manual_seed(0)
    module = build_attention(name, OPTIONS[name], AttentionShape(HEADS, KV_HEADS, DIM)).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    counted, block_features = [], module.block_features

    def counting(call, grid, **rest):
        counted.append(grid.num_blocks)
        return block_features(call, grid, **rest)

    module.block_features = counting
    return module, counted


def step(module, tensors, start, stop, kept, valid=None, room=0):
    """Queries `start` to `stop`, with `room` places for keys that are still to come."""
    q, k, v = tensors
    keys = stop + room
    mask = AttentionMask("causal_self", start, None if valid is None else valid[:, :keys])
    inputs = q[:, :, start:stop], k[:, :, :keys], v[:, :, :keys]
    with torch.no_grad():
        return module(*inputs, mask, context=AttentionContext(summaries=kept)).out


def same(module, tensors, start, stop, kept, **rest):
    # A sum for each of a few groups is rounded otherwise than the running sum over all.
    torch.testing.assert_close(
        step(module, tensors, start, stop, kept, **rest), step(module, tensors, start, stop, None, **rest)
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_block_is_summed_up_once(name):
    (module, counted), tensors, kept = layer(name), draw(TOKENS, dim=DIM, seed=1)[0], BlockSummaries()
    step(module, tensors, 0, 18, kept)
    assert counted == [4], "the fifth block is not complete"
    counted.clear()
    for position in range(18, TOKENS):
        step(module, tensors, position, position + 1, kept)
    assert counted == [1] * 7
    assert kept.blocks == TOKENS // SIZE == 11
    counted.clear()
    same(module, tensors, TOKENS - 1, TOKENS, kept)
    assert counted == [12], "only the call without summaries makes any"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("room", [0, 7])
def test_steps_of_any_size_and_a_cut_cache(name, room):
    """Also with places for later keys, which hold something else until their time comes."""
    (module, _), tensors, kept = layer(name), draw(TOKENS, dim=DIM, seed=1)[0], BlockSummaries()
    stale = [x.clone() for x in tensors]
    for x in stale[1:]:
        x[:, :, 20:] = 1e3
    same(module, stale, 0, 22, kept, room=room)
    for start, stop in ((17, 18), (18, 29), (29, 30), (30, 38)):  # from 17 on everything is another
        same(module, tensors, start, stop, kept, room=room)
    assert kept.blocks >= 9
    same(module, tensors, 0, 9, kept, room=room)
    assert kept.blocks == 2


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cut_cache_that_goes_on_with_other_tokens(name):
    """As many blocks as before, but others: what was made of them is not what it was."""
    (module, _), kept = layer(name), BlockSummaries()
    first, other = (draw(TOKENS, dim=DIM, seed=seed)[0] for seed in (1, 2))
    step(module, first, 0, 30, kept)
    for position in range(30, 34):
        step(module, first, position, position + 1, kept)
    changed = [torch.cat([a[:, :, :12], b[:, :, 12:]], 2) for a, b in zip(first, other, strict=True)]
    same(module, changed, 12, 32, kept)
    for position in range(32, TOKENS):
        same(module, changed, position, position + 1, kept)


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_is_part_of_what_is_kept(name):
    (module, counted), tensors, kept = layer(name), draw(TOKENS, dim=DIM, seed=1)[0], BlockSummaries()
    valid = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.7
    valid[:, 12:16] = False
    valid[:, 0] = True  # blocks count from the first real token
    same(module, tensors, 0, 30, kept, valid=valid)
    same(module, tensors, 30, 31, kept, valid=valid)
    other = valid.clone()
    other[1, 1:9] = ~other[1, 1:9]
    for changed in (other, None, valid):
        counted.clear()
        same(module, tensors, 31, 32, kept, valid=changed)
        assert counted == [7, 8], "with the padding, what it says of old blocks has changed"
    behind = valid.clone()
    behind[:, 30:] = True
    counted.clear()
    same(module, tensors, 32, 33, kept, valid=behind)
    assert counted == [1, 9]


def test_keys_of_another_sequence_are_summed_up_in_the_first_step():
    (module, counted), (q, k, v), kept = layer("ast"), draw(TOKENS, dim=DIM, seed=1)[0], BlockSummaries()
    for position in range(3):
        mask = AttentionMask("causal_cross", position)
        with torch.no_grad():
            given, alone = (
                module(q[:, :, position : position + 1], k, v, mask, context=AttentionContext(summaries=c)).out
                for c in (kept, None)
            )
        torch.testing.assert_close(given, alone)
    assert counted == [12, 12, 12, 12], "once with, and in each step without"


def test_with_gradients_or_nothing_to_append_to_nothing_is_kept():
    (module, _), (q, k, v), kept = layer("ast"), draw(TOKENS, dim=DIM, seed=1)[0], BlockSummaries()
    context = AttentionContext(summaries=kept)
    module(q, k, v, AttentionMask("causal_self"), context=context)
    with torch.no_grad():
        module(q, k, v, AttentionMask("bidirectional_self"), context=context)
    assert kept.blocks == 0


@pytest.mark.parametrize("group", [1, 16, 64])
@pytest.mark.parametrize("what", [torch.inf, torch.nan])
def test_what_a_later_value_holds_changes_no_earlier_choice(group, what):
    torch.manual_seed(0)
    options = {**OPTIONS["ast"], "query_group": group}
    module = build_attention("ast", options, AttentionShape(HEADS, KV_HEADS, DIM)).double().eval()
    torch.nn.init.normal_(module.key_weight)
    q, k, v = (x[:, :, :44] for x in draw(TOKENS, dim=DIM, seed=1)[0])
    later = v.clone()
    later[:, :, -1] = what
    mask, context = AttentionMask("causal_self"), AttentionContext(collect_stats=True)
    with torch.no_grad():
        wanted, got = (module(q, k, x, mask, context=context).stats.layout.to_mask() for x in (v, later))
    assert torch.equal(got, wanted)
