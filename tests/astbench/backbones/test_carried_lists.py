"""Carried lists in Hugging Face models: with a KV cache as without, whatever generation does to the cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from astbench import swap_attention
from tests.astbench.conftest import VOCABULARY, tiny_model

CARRIED = {"lists": "carried", "query_tile": 6, "block_size": 2, "min_blocks": 2, "density": 0.3}
SETTINGS = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def carried(family="llama", name="ast", **options):
    model = tiny_model(family)
    handle = swap_attention(model, name, {**CARRIED, **options})
    for slot in handle.slots:
        torch.manual_seed(8)
        for parameter in slot.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids(length=21, batch=2):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["ast", "random_topk"])
@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("gpt2", 1), ("bart", 1), ("bart", 3)])
def test_generation_is_that_without_a_cache(family, beams, name):
    model = carried(family, name)
    cached = model.generate(ids(), **SETTINGS, num_beams=beams)
    assert torch.equal(cached, model.generate(ids(), **SETTINGS, num_beams=beams, use_cache=False))


PAPERS = {
    "moba": {"block_size": 2, "top_k": 3},
    "quest": {"block_size": 2, "top_k": 3, "dense_layers": 1},
    "nsa": {"block_size": 4, "top_k": 4, "compress_size": 2, "compress_stride": 2, "window": 4},
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PAPERS)
def test_methods_whose_papers_have_own_lists_carry_them_too(name, beams):
    found = []
    for lists in ("carried", "own"):
        model = tiny_model("llama")
        swap_attention(model, name, {**PAPERS[name], "lists": lists, "query_tile": 6})
        with torch.no_grad():
            logits = model(ids()).logits
        cached = model.generate(ids(), **SETTINGS, num_beams=beams)
        assert torch.equal(cached, model.generate(ids(), **SETTINGS, num_beams=beams, use_cache=False))
        found.append(logits)
    assert not torch.allclose(*found)


def test_own_lists_write_something_else():
    """So the tests here say something."""
    mine, own = (model.generate(ids(), **SETTINGS) for model in (carried(), carried(lists="own")))
    assert not torch.equal(mine, own)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_on_the_left(beams):
    model = carried()
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :9] = 0
    both = model.generate(ids(), attention_mask=mask, **SETTINGS, num_beams=beams)[:, 21:]
    alone = model.generate(ids()[:1, 9:], **SETTINGS, num_beams=beams)[:, 12:]
    assert torch.equal(both[:1], alone)


@torch.no_grad()
def test_a_cache_may_be_cut_inside_its_last_tile_and_its_sequences_put_into_another_order():
    model, tokens = carried(), ids(length=23, batch=3)
    expected = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(tokens[:, :22], past_key_values=cache)
    cache.crop(-2)  # the tile begins at 18
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    step = model(tokens[order, 20:21], past_key_values=cache).logits
    torch.testing.assert_close(step[:, 0], expected[order, 20])
    rest = model(tokens[order, 21:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[order, 21:])


@torch.no_grad()
@pytest.mark.parametrize("what", ["another cache", "cut behind the tile"])
def test_what_nobody_kept_is_refused(what):
    model, tokens = carried(), ids(length=23)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :20], past_key_values=cache)
    if what == "another cache":
        cache = copy.deepcopy(cache)
    else:
        cache.crop(-4)
    position = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=f"decoding from position {position} needs what .* or set --attention.lists=own"
    ):
        model(tokens[:, position : position + 1], past_key_values=cache)


@torch.no_grad()
def test_a_cache_cut_where_a_tile_begins_goes_on():
    model, tokens = carried(), ids(length=23)
    expected = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(tokens[:, :20], past_key_values=cache)
    cache.crop(-8)
    torch.testing.assert_close(model(tokens[:, 12:], past_key_values=cache).logits, expected[:, 12:])
