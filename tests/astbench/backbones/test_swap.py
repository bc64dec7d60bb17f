"""Swapping: the same logits as the stock model at full density, everything undone, everything lost refused."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from astbench.backbones.families import FAMILIES
from astbench.backbones.swap import swap_attention
from astbench_registry import (
    Attention,
    AttentionConfig,
    AttentionOutput,
    Capabilities,
    CapabilityError,
    register_attention,
)
from tests.astbench.conftest import CAUSAL, ENCODERS, SEQ2SEQ, SETTINGS, VOCABULARY, tiny_model

BATCH, LENGTH, TARGET = 3, 29, 23
FULL = {"dense": {}, "ast": {"density": 1.0, "block_size": 4}}
SPARSE = {"density": 0.3, "block_size": 4, "min_blocks": 2, "query_group": 3}


def inputs(family, seed=1):
    """Token ids with padding at the end of some rows (decoders: at the front, as for generation)."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
    }
    for row, padding in ((1, 7), (2, 16)):
        batch["attention_mask"][row, slice(None, padding) if family in CAUSAL else slice(-padding, None)] = 0
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (BATCH, TARGET), generator=generator)
    return batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def real_rows(family, batch, values):
    """Rows of real tokens: what padding holds is nobody's business."""
    return values.flatten(0, 1) if family in SEQ2SEQ else values[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize(("name", "options"), FULL.items(), ids=FULL)
def test_full_density_gives_the_stock_logits_and_undo_restores_them(family, name, options):
    model, batch = tiny_model(family), inputs(family)
    stock, keys = logits(model, batch), list(model.state_dict())
    handle = swap_attention(model, name, options)
    swapped = logits(model, batch)
    torch.testing.assert_close(real_rows(family, batch, swapped), real_rows(family, batch, stock), rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "astbench"
    handle.undo()
    assert torch.equal(logits(model, batch), stock)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "astbench")


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_sparse_attention_changes_the_logits(family):
    model, batch = tiny_model(family), inputs(family)
    stock = logits(model, batch)
    swap_attention(model, "random_topk", {"density": 0.1, "block_size": 4, "query_group": 4, "min_blocks": 1})
    assert not torch.allclose(logits(model, batch), stock, atol=1e-2)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beam"])
@pytest.mark.parametrize(("name", "options"), FULL.items(), ids=FULL)
def test_generates_what_the_stock_model_does(family, beams, name, options):
    model = tiny_model(family)
    batch = {n: t for n, t in inputs(family).items() if n != "decoder_input_ids"}
    settings = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(**batch, **settings)
    swap_attention(model, name, options)
    assert torch.equal(model.generate(**batch, **settings), stock)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("ast", {"block_size": 4, "density": 1.0})])
def test_generates_with_a_static_cache(family, name, options):
    model = tiny_model(family)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "attention_mask": padding}
    expected = model.generate(ids, **settings)
    swap_attention(model, name, options)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("llama", ["causal_self"] * 3),
        ("bert", ["bidirectional_self"] * 3),
        ("bart", ["bidirectional_self"] * 2 + ["causal_self"] * 3 + ["causal_cross"] * 3),
    ],
)
def test_slots_and_patterns(family, patterns):
    handle = swap_attention(tiny_model(family), "dense")
    assert [slot.pattern for slot in handle.slots] == patterns
    assert len({slot.path for slot in handle.slots}) == len(patterns)


@pytest.mark.parametrize(
    ("where", "layers", "count"),
    [
        (["encoder_self"], None, 2),
        (["decoder_self"], None, 3),
        (["cross"], None, 3),
        (["decoder_self", "cross"], [0, 2], 4),
        (["encoder_self"], [1], 1),
    ],
)
def test_where_and_layers_choose_a_subset_and_the_rest_runs_dense(where, layers, count):
    model, batch = tiny_model("bart"), inputs("bart")
    stock = logits(model, batch)
    handle = swap_attention(model, "ast", FULL["ast"], where=where, layers=layers)
    assert len(handle.slots) == count
    torch.testing.assert_close(logits(model, batch), stock, rtol=1e-4, atol=1e-4)


def test_layer_index_counts_within_its_stack():
    handle = swap_attention(tiny_model("bart"), "dense", where=["decoder_self"])
    assert [(s.attention.shape.layer_index, s.attention.shape.num_layers) for s in handle.slots] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_gradients_reach_the_variants_parameters(family):
    model, batch = tiny_model(family).train(), inputs(family)
    # Rows are sampled for distillation: of so few groups, the one sampled may have no choice to learn.
    handle = swap_attention(model, "ast", {**SPARSE, "distill_fraction": 1.0})
    loss = model(**batch).logits.square().mean() + sum(handle.losses().values())
    loss.backward()
    own = {id(p) for p in handle.parameters()}
    assert own <= {id(p) for p in model.parameters()}
    for slot in handle.slots:
        for name, parameter in slot.named_parameters():
            assert parameter.grad is not None, f"{slot.path}.{name}"
        assert any(p.grad.abs().sum() > 0 for p in slot.parameters()), slot.path


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("ast", SPARSE), ("local", {"window": 3})])
def test_a_causal_model_does_not_see_the_future(family, name, options):
    model = tiny_model(family)
    swap_attention(model, name, options)
    ids = inputs(family)["input_ids"]
    changed = ids.clone()
    changed[:, 17] = (changed[:, 17] + 1) % VOCABULARY
    before, after = (logits(model, {"input_ids": i}) for i in (ids, changed))
    torch.testing.assert_close(before[:, :17], after[:, :17], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 17:], after[:, 17:], atol=1e-3)


def test_hidden_states_are_given_to_a_variant_that_asks(fresh_registry):
    seen = []

    @dataclass(frozen=True)
    class NosyConfig(AttentionConfig):
        """Reads the layer's input."""

        capabilities: ClassVar = Capabilities(
            patterns=("causal_self", "bidirectional_self"), shift_invariant=True, needs_hidden_states=True
        )

    @register_attention("nosy", NosyConfig)
    class Nosy(Attention):
        def forward(self, q, k, v, mask, *, scale=None, context=None):
            seen.append(context.hidden_states)
            return AttentionOutput(q)

    for family in ("llama", "bert", "gpt2"):
        seen.clear()
        model = tiny_model(family)
        handle = swap_attention(model, "nosy")
        seen.clear()
        logits(model, inputs(family))
        assert [tuple(h.shape) for h in seen] == [(BATCH, LENGTH, 24)] * 3
        handle.undo()
        assert logits(model, inputs(family)).isfinite().all()
        assert len(seen) == 3


_NO_DROPOUT = {
    "llama": {"use_cache": False},
    "bert": {"hidden_dropout_prob": 0.0},
    "bart": {"dropout": 0.0, "use_cache": False},
}


@pytest.mark.parametrize("family", _NO_DROPOUT)
def test_activation_checkpointing_gives_the_same_gradients(family):
    grads = []
    for checkpointing in (False, True):
        model, batch = tiny_model(family, **_NO_DROPOUT[family]).train(), inputs(family)
        torch.manual_seed(9)
        handle = swap_attention(model, "ast", {**SPARSE, "distill_weight": 0.0})
        if checkpointing:
            # Called gradient_checkpointing_enable by older releases; newer ones warn about that name.
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        torch.manual_seed(9)
        model(**batch).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert any(p.grad is not None for p in handle.parameters())
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_state_dict_round_trip(family):
    batch, models = inputs(family), []
    for seed in (1, 2):
        models.append(tiny_model(family))
        handle = swap_attention(models[-1], "ast", SPARSE)
        torch.manual_seed(seed)
        for parameter in handle.parameters():
            torch.nn.init.normal_(parameter)
    first, second = models
    assert any(".astbench." in name for name in first.state_dict())
    assert not torch.allclose(logits(first, batch), logits(second, batch), atol=1e-4)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first, batch), logits(second, batch))


def test_attention_dropout_is_set_to_0_said_and_restored():
    model = tiny_model("bert", attention_probs_dropout_prob=0.125)
    handle = swap_attention(model, "dense")
    assert handle.notes == ["attention dropout 0.125 -> 0 (the same for every variant)"]
    attention = model.bert.encoder.layer[0].attention.self
    assert attention.dropout.p == 0.0
    handle.undo()
    assert attention.dropout.p == 0.125


def test_listening_leaves_statistics_only_within():
    model, batch = tiny_model("bert"), inputs("bert")
    handle = swap_attention(model, "ast", SPARSE)
    with handle.collecting_stats() as slots:
        logits(model, batch)
        assert all(0 < float(d) <= 1 for s in slots for d in s.stats.density)
    logits(model, batch)
    assert all(s.stats is None for s in handle.slots)


def attention_of(model):
    """What every part of the model attends with: a part may have a configuration of its own."""
    return {n: m.config._attn_implementation for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}


def refused(model, name="dense", options=None, **choice):
    """The one-line reason; the model must be as before."""
    keys, implementations = list(model.state_dict()), attention_of(model)
    with pytest.raises(CapabilityError) as caught:
        swap_attention(model, name, options, **choice)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys
    assert attention_of(model) == implementations
    return str(caught.value)


@pytest.mark.parametrize("family", ["longformer", "gptj"])
def test_a_family_without_the_interface_is_refused_with_those_that_have_it(family):
    if family == "longformer":
        settings = {**SETTINGS["bert"], "attention_window": 4, "pad_token_id": 1}
        model = tiny_model(family, AutoModel, "eager", **settings)
    else:
        model = tiny_model(
            family, AutoModelForCausalLM, "eager", n_embd=24, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
        )
    reason = refused(model)
    assert "does not use transformers' attention interface" in reason
    assert ", ".join(FAMILIES) in reason


def test_layers_that_share_their_attention_are_refused():
    albert = tiny_model("albert", AutoModelForMaskedLM, **_WIDE, embedding_size=12)
    assert "shares one attention module among its layers" in refused(albert)


def test_a_layer_that_attends_twice_is_refused_for_that():
    model = tiny_model("diffllama", AutoModelForCausalLM, **SETTINGS["llama"])
    assert "DiffLlamaAttention of DiffLlamaForCausalLM attends 2 times in one pass" in refused(model)


def test_what_is_no_text_model_is_refused():
    with pytest.raises(CapabilityError, match="Linear is no transformers model"):
        swap_attention(torch.nn.Linear(2, 2), "dense")
    sound = {"conv_dim": [8], "conv_kernel": [2], "conv_stride": [2], "num_feat_extract_layers": 1}
    hubert = AutoModel.from_config(AutoConfig.for_model("hubert", **_WIDE, **sound, num_conv_pos_embedding_groups=2))
    with pytest.raises(CapabilityError, match="HubertModel cannot be probed with token ids"):
        swap_attention(hubert, "dense")


@torch.no_grad()
def test_a_vision_transformer_is_probed_with_a_picture():
    vit = AutoModel.from_config(AutoConfig.for_model("vit", **_WIDE, image_size=[8, 12], patch_size=4)).eval()
    pictures = torch.randn(2, 3, 8, 12)
    own = vit(pictures).last_hidden_state
    handle = swap_attention(vit, "dense")
    assert len(handle.slots) == 2
    torch.testing.assert_close(vit(pictures).last_hidden_state, own)
    handle.undo()
    swap_attention(vit, "local", {"window": 1})
    assert (vit(pictures).last_hidden_state - own).abs().max() > 1e-3


def test_parts_stay_in_the_mode_they_were_in():
    model = tiny_model("bert").train()
    model.bert.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    swap_attention(model, "dense")
    after = {name: module.training for name, module in model.named_modules() if name in before}
    assert after == before


_WIDE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_t5_position_bias_is_refused():
    settings = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    model = tiny_model("t5", AutoModelForSeq2SeqLM, **settings, decoder_start_token_id=0)
    assert "position bias" in refused(model) or "does not use transformers' attention interface" in refused(model)


def test_sliding_window_masks_are_refused():
    mistral = tiny_model(
        "mistral", AutoModelForCausalLM, **{**SETTINGS["llama"], "sliding_window": 4, "max_position_embeddings": 64}
    )
    modernbert = tiny_model(
        "modernbert", layer_types=["full_attention", "sliding_attention", "full_attention"], local_attention=8
    )
    for model in (mistral, modernbert):
        assert "sliding" in refused(model)


def test_mistral_without_a_window_works():
    settings = {**SETTINGS["llama"], "sliding_window": None, "max_position_embeddings": 64}
    model = tiny_model("mistral", AutoModelForCausalLM, **settings)
    assert len(swap_attention(model, "dense").slots) == 3


def test_a_variant_that_returns_something_else_is_named(monkeypatch):
    from astbench_registry.variants.dense import DenseAttention

    model = tiny_model("bert")
    swap_attention(model, "dense")
    right = DenseAttention.forward

    def narrow(self, *args, **kwargs):
        return right(self, *args, **kwargs)._replace(out=torch.zeros(1, 4, 8, 2))

    for wrong, part in ((narrow, r"got \(1, 4, 8, 2\)"), (lambda *a, **k: torch.zeros(1), "got Tensor")):
        monkeypatch.setattr(DenseAttention, "forward", wrong)
        with pytest.raises(CapabilityError, match="DenseAttention must return an AttentionOutput.*" + part):
            model(input_ids=torch.ones(1, 8, dtype=torch.long))


@pytest.mark.parametrize("choice", [{"where": "cross"}, {"where": ["cross"]}, {"layers": []}, {"where": []}])
def test_nothing_to_attach_to_is_refused(choice):
    reason = refused(tiny_model("llama"), **choice)
    assert "no attention layer" in reason and "3 decoder_self" in reason


@pytest.mark.parametrize(
    ("choice", "part"),
    [
        ({"where": "decoder"}, "where='decoder' is not one of encoder_self, decoder_self, cross"),
        ({"layers": [0, 7]}, "there is no layer 7, only 0 to 2"),
        ({"layers": [-1]}, "there is no layer -1"),
        ({"layers": 1}, "layers=1 must be a list of layer numbers"),
        ({"layers": ["0"]}, "must be a list of layer numbers"),
    ],
)
def test_places_and_layers_that_do_not_exist_are_refused(choice, part):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=part):
        swap_attention(model, "dense", **choice)
    swap_attention(model, "dense")  # nothing of the refused swap is left


def test_weights_that_are_not_there_are_said(monkeypatch):
    model = tiny_model("bert")
    swap_attention(model, "dense")
    said = []
    monkeypatch.setattr("astbench.backbones.hooks.logger.warning_once", said.append)
    out = model(input_ids=torch.ones(1, 8, dtype=torch.long), output_attentions=True)
    assert out.attentions == () and said and "output_attentions stays empty" in said[0]


def test_a_variant_without_cross_attention_is_refused_where_there_is_some():
    model = tiny_model("bart")
    assert "no causal cross attention" in refused(model, "local")
    assert len(swap_attention(model, "local", where=["encoder_self", "decoder_self"]).slots) == 5


def test_swapping_twice_is_refused():
    model = tiny_model("llama")
    handle = swap_attention(model, "dense")
    assert "swapped already" in refused(model, "ast")
    handle.undo()
    swap_attention(model, "ast")


def test_unknown_option_is_refused_before_the_model_is_touched():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="did you mean 'block_size'"):
        swap_attention(model, "ast", {"blok_size": 3})
    assert model.config._attn_implementation == "sdpa"


def test_a_ready_made_mask_is_refused():
    model = tiny_model("bert")
    swap_attention(model, "dense")
    batch = inputs("bert")
    batch["attention_mask"] = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    with pytest.raises(CapabilityError, match="ready-made"):
        logits(model, batch)
