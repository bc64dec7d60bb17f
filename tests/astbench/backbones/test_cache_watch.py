"""Summaries of key blocks beside Hugging Face's KV cache: found again, or made anew when the cache is another."""

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from astbench import swap_attention
from tests.astbench.conftest import VOCABULARY, tiny_model

AST = {"block_size": 2, "min_blocks": 2, "density": 0.5}  # so that half of the choices are close
SETTINGS = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def swapped(family="llama", name="ast", **options):
    """The model, and the blocks in each call of the first layer's `block_features`."""
    model = tiny_model(family)
    handle = swap_attention(model, name, {**AST, **options})
    counted = []
    for slot in handle.slots:
        torch.manual_seed(8)
        for parameter in slot.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    attention = handle.slots[-1].attention
    block_features = attention.block_features

    def counting(call, grid, **rest):
        counted.append(grid.num_blocks)
        return block_features(call, grid, **rest)

    attention.block_features = counting
    return model, counted, handle


def ids(length=21, batch=2):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def forgetful(monkeypatch):
    """Calls that it is given to run as if nobody kept summaries."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr("astbench.backbones.cache_watch._layer", lambda cache, index: None)
            return call()

    return run


@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", None), ("llama", "static"), ("gpt2", None), ("gpt2", "static"), ("bart", None), ("bart", "static")],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_and_sums_up_each_block_once(family, beams, cache, forgetful):
    model, counted, _ = swapped(family)
    settings = {**SETTINGS, "num_beams": beams, **({"cache_implementation": cache} if cache else {})}
    expected = forgetful(lambda: model.generate(ids(), **settings))
    without = sum(counted)
    counted.clear()
    assert torch.equal(model.generate(ids(), **settings), expected)
    if beams == 1:
        # Of bart the last layer's cross-attention: 21 keys, all in the first step.
        assert sum(counted) == (11 if family == "bart" else (21 + 14 - 2) // 2)
        assert without > 100
    else:
        assert sum(counted) >= 11


def test_padding_on_the_left(forgetful):
    model, counted, _ = swapped()
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :9] = 0
    expected = forgetful(lambda: model.generate(ids(), attention_mask=mask, **SETTINGS))
    counted.clear()
    assert torch.equal(model.generate(ids(), attention_mask=mask, **SETTINGS), expected)
    assert sum(counted) == (21 + 14 - 2) // 2 + (12 + 14 - 2) // 2  # each sequence from its first token on


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_two_caches_in_turn_and_one_that_is_changed(kind, forgetful):
    """Each step's logits with summaries are those without."""
    model, counted, _ = swapped()

    def new():
        return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=48)

    tokens = ids(40)

    @torch.no_grad()
    def play():
        logits, (a, b) = [], (new(), new())

        def feed(cache, rows, start, stop):
            logits.append(model(tokens[rows, start:stop], past_key_values=cache, use_cache=True).logits)

        feed(a, [0, 1], 0, 20)
        feed(b, [1, 0], 0, 17)
        feed(a, [0, 1], 20, 21)
        feed(b, [1, 0], 17, 18)
        a.reorder_cache(torch.tensor([1, 0]))
        feed(a, [1, 0], 21, 23)
        twin = copy.deepcopy(b)
        for cache in (b, twin):
            cache.reorder_cache(torch.tensor([0, 0]))
            feed(cache, [1, 1], 18, 22)
        if kind == "dynamic":
            a.crop(-6)
            feed(a, [0, 1], 30, 39)
            b.batch_select_indices(torch.tensor([1]))
            feed(b, [1], 22, 27)
        a.reset()
        feed(a, [0, 1], 3, 24)
        for layer in a.layers:  # in place, behind everybody's back
            layer.keys.neg_()
        feed(a, [0, 1], 24, 26)
        for layer in a.layers:
            layer.values[1] = -3 * layer.values[0]
        feed(a, [0, 1], 26, 28)
        return logits

    expected = forgetful(play)
    counted.clear()
    for got, wanted in zip(play(), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert sum(counted)


def test_kept_from_one_step_to_the_next_in_inference_mode_too():
    model, counted, _ = swapped()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for start, stop in ((0, 20), (20, 21), (21, 22), (22, 25)):
            model(ids(30)[:, start:stop], past_key_values=cache, use_cache=True)
    assert counted == [9, 1, 2]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_static_cache_used_again_in_inference_mode(family, forgetful):
    """Nobody counts changes there, and its tensors stay the same."""
    model, _, _ = swapped(family)
    first, second = ids(), ids().flip(1)

    @torch.inference_mode()
    def play():
        cache = StaticCache(model.config, max_cache_len=40)
        if family == "llama":
            model(first, past_key_values=cache)
            cache.reset()
            return model(second, past_key_values=cache).logits
        cache = EncoderDecoderCache(cache, StaticCache(model.config, max_cache_len=40))
        logits = []
        for source in (first, second):
            cache.reset()
            for position in range(3):
                given = {"decoder_input_ids": first[:, position : position + 1], "past_key_values": cache}
                logits.append(model(source, **given).logits)
        return torch.cat(logits)

    torch.testing.assert_close(play(), forgetful(play))


def test_prefill_in_inference_mode_and_steps_outside(forgetful):
    model, counted, _ = swapped()

    def play():
        cache, logits = DynamicCache(config=model.config), []
        with torch.inference_mode():
            model(ids(30)[:, :20], past_key_values=cache)
        with torch.no_grad():
            for position in range(20, 27):
                logits.append(model(ids(30)[:, position : position + 1], past_key_values=cache).logits)
        return torch.cat(logits)

    expected = forgetful(play)
    counted.clear()
    torch.testing.assert_close(play(), expected)
    assert counted == [9, 1, 1, 1, 1]


def test_threads_with_a_cache_each():
    """Both are between the look at their cache and attention at the same time, in every call of the last layer."""
    model, counted, _ = swapped()
    tokens = torch.randint(3, VOCABULARY, (2, 1, 40), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def play(row):
        cache = DynamicCache(config=model.config)
        logits = [model(tokens[row, :, :30], past_key_values=cache).logits]
        for position in range(30, 40):
            logits.append(model(tokens[row, :, position : position + 1], past_key_values=cache).logits)
        return torch.cat(logits, 1)

    expected = [play(row) for row in range(2)]
    alone = sum(counted)
    counted.clear()
    together = Barrier(2, timeout=60)
    projection = model.model.layers[-1].self_attn.q_proj

    def meet(*_):
        together.wait()

    projection.register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        for got, wanted in zip(pool.map(play, range(2)), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert sum(counted) == alone == 2 * (39 // 2)


@pytest.mark.parametrize("change", ["weights", "dtype", "autocast"])
def test_what_else_summaries_are_made_of(change, forgetful):
    def play():
        model, _, handle = swapped()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
                model(ids(), past_key_values=cache)
            for slot in handle.slots if change == "weights" else ():
                torch.nn.init.normal_(slot.attention.key_weight)
            if change == "dtype":
                model.double()
            return model(ids(4), past_key_values=cache).logits

    torch.testing.assert_close(play(), forgetful(play))


def test_a_copied_and_a_loaded_model_keep_them_too():
    model = tiny_model("llama")
    swap_attention(model, "ast", AST)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), torch.load(whole, weights_only=False)):
        seen = []
        attention = other.model.layers[0].self_attn.astbench.attention
        attention.block_features = lambda call, grid, to=attention.block_features, seen=seen, **named: (
            seen.append(call.k.shape[2]) or to(call, grid, **named)
        )
        cache = DynamicCache(config=other.config)
        with torch.no_grad():
            for start, stop in ((0, 17), (17, 18), (18, 19), (19, 20)):
                other(ids()[:, start:stop], past_key_values=cache)
        assert seen == [16, 2]


def test_a_call_that_fails_keeps_no_cache_alive(monkeypatch):
    model, _, handle = swapped()
    cache = DynamicCache(config=model.config)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(handle.slots[1].attention, "choose", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids(), past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_another_attention_on_the_same_cache_begins_anew(forgetful):
    model, _, handle = swapped()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids()[:, :20], past_key_values=cache, use_cache=True)
        handle.undo()
        assert not any(module._forward_pre_hooks for module in model.modules())
        swap_attention(model, "pooled_topk", AST)
        twin = copy.deepcopy(cache)
        got = model(ids()[:, 20:], past_key_values=cache, use_cache=True).logits
        wanted = forgetful(lambda: model(ids()[:, 20:], past_key_values=twin, use_cache=True).logits)
    torch.testing.assert_close(got, wanted)


def test_nothing_of_a_cache_outlives_it():
    from astbench.backbones import cache_watch

    model, _, _ = swapped()
    before = len(cache_watch._kept)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(), past_key_values=cache, use_cache=True)
    assert len(cache_watch._kept) == before + 3
    del cache
    assert len(cache_watch._kept) == before
