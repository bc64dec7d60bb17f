"""Longformer against transformers' own layer, and the backbones whose projections it starts from."""

import sys

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, CapabilityError, build_attention

BATCH, HEADS, DIM = 2, 6, 5
BIDIRECTIONAL = AttentionMask("bidirectional_self")


def theirs(window, dtype, *, seed=0):
    package = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = package.LongformerConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layer = package.LongformerSelfAttention(config, layer_id=0).to(dtype)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return layer


def run_theirs(layer, hidden, valid, chosen):
    """Their mask: -10000 for padding, 0 for a window, 10000 for a global token."""
    mask = torch.where(chosen, 1e4, torch.where(valid, 0.0, -1e4)).to(hidden.dtype)
    return layer(
        hidden,
        attention_mask=mask,
        is_index_masked=mask < 0,
        is_index_global_attn=mask > 0,
        is_global_attn=bool(chosen.any()),
    )[0]


@pytest.mark.parametrize("backend", ["auto", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_layer_in_transformers(dtype, backend):
    """Their softmax is in float32 even for float64 inputs, hence one tolerance."""
    window, length = 4, 64  # they want multiples of twice the window
    layer = theirs(window, dtype)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH, length, HEADS * DIM, generator=g, dtype=dtype)
    valid = torch.rand(BATCH, length, generator=g) >= 0.2
    named = torch.rand(BATCH, length, generator=g) < 0.1
    chosen = valid & (named | (valid.cumsum(1) == 1))  # the first real token, and those that are named

    shape = AttentionShape(HEADS, HEADS, DIM, hidden_size=HEADS * DIM)
    options = {"window": window, "global_projections": True, "backend": backend}
    module = build_attention("longformer", options, shape).to(dtype)
    own = {name: value for name, value in layer.state_dict().items() if "_global" in name}
    own.pop("key_global.bias")  # softmax takes it away
    module.load_state_dict(own)
    linears = (layer.query, layer.key, layer.value)
    q, k, v = (x(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in linears)
    context = AttentionContext(hidden_states=hidden, global_tokens=named)
    got = module(q, k, v, AttentionMask(key_valid=valid), context=context).out
    got = got.transpose(1, 2).flatten(2)
    expected = run_theirs(layer, hidden, valid, chosen)
    torch.testing.assert_close(got[valid], expected[valid], rtol=0, atol=1e-6)


def test_fault_of_theirs_float64_gradients_are_nan_where_a_window_is_all_padding():
    """The reason why the witness is compared forward; the float64 oracle above holds our gradients."""
    layer = theirs(4, torch.float64)
    hidden = torch.randn(1, 64, HEADS * DIM, dtype=torch.float64, requires_grad=True)
    valid = (torch.arange(64) < 32)[None]
    out = run_theirs(layer, hidden, valid, torch.zeros_like(valid))
    assert out.isfinite().all()
    out[:, :32].sum().backward()
    assert hidden.grad.isnan().any()


def test_fault_of_theirs_a_window_of_one_key_a_side_fails():
    layer, hidden = theirs(1, torch.float32), torch.randn(1, 8, HEADS * DIM)
    everything = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expanded size"):
        run_theirs(layer, hidden, everything, ~everything)


# ----- their products as a backend


def test_backend_says_what_ran_and_what_it_cannot():
    module = build_attention("longformer", {"backend": "transformers"}, AttentionShape(2, 2, 4))
    q, k, v = torch.randn(3, 1, 2, 20, 4).unbind()
    assert module(q, k, v, BIDIRECTIONAL, context=AttentionContext(collect_stats=True)).stats.backend == "transformers"
    assert module.config.can.patterns == ("bidirectional_self",)
    assert not (list(module.parameters()) or module.state_dict())
    with pytest.raises(CapabilityError, match="no causal self attention"):
        module.config.can.check("longformer", "causal_self")


def test_backend_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.longformer.modeling_longformer", None)
    with pytest.raises(ValueError, match="backend=transformers cannot run here: package transformers is not installed"):
        build_attention("longformer", {"backend": "transformers"}, AttentionShape(2, 2, 4))


# ----- backbones

TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
HALF = {"layers": 1, "attention_heads": 2}
BART = {"d_model": 12, "vocab_size": 11, **{f"{x}_{n}": HALF[n] for x in ("encoder", "decoder") for n in HALF}}


def attention_of(model_type, options, name):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModel.from_config(config)
    return next(x for x in model.modules() if type(x).__name__ == name)


def projected():
    shape = AttentionShape(2, 2, 6, hidden_size=12)
    return build_attention("longformer", {"global_projections": True}, shape)


@pytest.mark.parametrize(
    ("model_type", "options", "name", "linears"),
    [
        ("bert", TINY, "BertSelfAttention", "query key value"),
        ("roberta", TINY, "RobertaSelfAttention", "query key value"),
        ("bart", BART, "BartAttention", "q_proj k_proj v_proj"),
        ("distilbert", {"dim": 12, "n_layers": 1, "n_heads": 2, "vocab_size": 11}, None, "q_lin k_lin v_lin"),
    ],
)
def test_projections_start_as_the_backbones(model_type, options, name, linears):
    layer = attention_of(model_type, options, name or "DistilBertSelfAttention")
    module = projected()
    module.adopt(layer)
    for own, theirs in zip(("query_global", "key_global", "value_global"), linears.split(), strict=True):
        mine, copied = getattr(module, own), getattr(layer, theirs)
        assert torch.equal(mine.weight, copied.weight) and mine.weight is not copied.weight
        assert mine.bias is None or torch.equal(mine.bias, copied.bias)


@pytest.mark.parametrize(
    ("model_type", "options", "name", "reason"),
    [
        ("llama", {**TINY, "intermediate_size": 12}, "LlamaAttention", "rotary positions"),
        ("esm", {**TINY, "position_embedding_type": "rotary", "pad_token_id": 0}, "EsmSelfAttention", "rotary"),
        ("modernbert", {**TINY, "pad_token_id": 0}, "ModernBertAttention", "rotary positions"),
        ("gpt2", {"n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 11}, "GPT2Attention", "needs linear layers"),
        ("bert", {**TINY, "hidden_size": 16}, "BertSelfAttention", r"expects projections of \(12, 12\)"),
    ],
)
def test_backbones_without_such_projections_are_refused(model_type, options, name, reason):
    with pytest.raises(CapabilityError, match=reason):
        projected().adopt(attention_of(model_type, options, name))


@pytest.mark.parametrize(("model_type", "options"), [("roberta", {**TINY, "pad_token_id": 0}), ("bart", BART)])
def test_a_fresh_swap_with_a_wide_window_is_the_dense_backbone(model_type, options):
    """Copied projections of the layer's own input give the layer's own queries, keys and values."""
    transformers = pytest.importorskip("transformers")
    swapping = pytest.importorskip("astbench.backbones.swap")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **options)).eval()
    real = torch.arange(30) < torch.tensor([[30], [21]])
    inputs = {"input_ids": torch.arange(60).view(2, 30) % 7 + 3, "attention_mask": real.long()}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        options = {"window": 30, "global_projections": True}
        handle = swapping.swap_attention(model, "longformer", options, where=("encoder_self", "decoder_self"))
        handle.set_global_tokens(torch.arange(30).expand(2, -1) % 5 == 0)
        got = model(**inputs).last_hidden_state
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-5)
