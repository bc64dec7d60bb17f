"""CCT: published sizes, the published arithmetic written out, saving, and every attention of the registry in it."""

import math

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForImageClassification

from astbench import swap_attention
from astbench.backbones.cct import CCTConfig, CCTForImageClassification
from astbench.backbones.load import load_backbone
from astbench.backbones.presets import BackboneConfig, cct_tokens, resolve_preset
from astbench_registry import CapabilityError
from astbench_registry.registry import make_config, registered

SMALL = {"image_size": 12, "hidden_size": 20, "num_attention_heads": 5, "intermediate_size": 28, "conv_channels": 7}


def cct(seed=0, **changes):
    """A small model in float64 whose every part matters to the logits."""
    torch.manual_seed(seed)
    model = CCTForImageClassification(CCTConfig(**{**SMALL, "num_labels": 3, **changes})).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif parameter.dim() == 2 or name.endswith("bias"):
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "millions", "tokens"),
    [("cct-7/3x1", 3_760_139, "3.76", 256), ("cct-2/3x2", 283_723, "0.28", 64)],
)
def test_presets_have_the_published_number_of_parameters(name, parameters, millions, tokens):
    model = load_backbone(BackboneConfig(name), "image_classification", settings={"num_labels": 10})
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameters and f"{counted / 1e6:.2f}" == millions
    assert model.config.max_position_embeddings == model.positions.shape[1] == tokens


def test_the_short_names():
    assert resolve_preset("tiny", "image_classification") == "cct-2/3x2"
    assert resolve_preset("small", "image_classification") == "cct-7/3x1"
    assert resolve_preset("cct-2/3x2", "image_classification") == "cct-2/3x2"


@pytest.mark.parametrize("size", [8, 9, 24, 31, 32, 40])
@pytest.mark.parametrize(("convolutions", "kernel"), [(1, 3), (2, 3), (2, 7)])
def test_tokens_are_counted_as_the_tokenizer_makes_them(size, convolutions, kernel):
    model = cct(image_size=size, num_conv_layers=convolutions, kernel_size=kernel)
    made = model.tokenizer(torch.zeros(1, 3, size, size, dtype=torch.float64))
    assert made.shape == (1, cct_tokens(size, convolutions, kernel), 20)


# -- arithmetic ----------------------------------------------------------------------------------------------------


def convolved(picture, weight):
    """3 x 3 convolution with padding 1, ReLU, and pooling of 3 by steps of 2: one place at a time."""
    size = picture.shape[-1]
    padded = pad(picture, (1, 1, 1, 1))
    out = torch.stack(
        [
            torch.stack([(padded[:, y : y + 3, x : x + 3] * weight).sum((1, 2, 3)) for x in range(size)], 1)
            for y in range(size)
        ],
        1,
    ).clamp(min=0)
    half = (size - 1) // 2 + 1
    padded = pad(out, (1, 1, 1, 1), value=-math.inf)
    return torch.stack(
        [
            torch.stack([padded[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3].amax((1, 2)) for x in range(half)], 1)
            for y in range(half)
        ],
        1,
    )


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def attended(x, attention, heads):
    out = []
    size = x.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (linear(x, p)[:, part] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        weights = (q @ k.T / size**0.5).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ v)
    return linear(torch.cat(out, -1), attention.o_proj)


def written_out(model, picture, *, norm_on_the_stream=True):
    """Logits of one picture, from the paper's equations and the published order of norms."""
    for convolution in model.tokenizer.convolutions:
        picture = convolved(picture, convolution.weight)
    x = picture.flatten(1).T + model.positions[0]
    for layer in model.layers:
        x = x + attended(norm(x, layer.norm_attention), layer.attention, model.config.num_attention_heads)
        normed = norm(x, layer.norm_stream)
        up = linear(normed, layer.up)
        up = up * 0.5 * (1 + torch.erf(up / 2**0.5))
        x = (normed if norm_on_the_stream else x) + linear(up, layer.down)
    x = norm(x, model.norm)
    scores = linear(x, model.attention_pool).exp()
    return linear((scores / scores.sum() * x).sum(0), model.classifier)


@torch.no_grad()
def test_it_is_the_published_arithmetic():
    model = cct()
    pictures = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = model(pixel_values=pictures).logits
    torch.testing.assert_close(got, torch.stack([written_out(model, p) for p in pictures]), rtol=0, atol=1e-12)
    # The textbook's pre-norm layer is another model: the comparison would notice.
    other = torch.stack([written_out(model, p, norm_on_the_stream=False) for p in pictures])
    assert (got - other).abs().max() > 1e-2


@torch.no_grad()
def test_weights_start_as_published():
    torch.manual_seed(0)
    model = load_backbone(BackboneConfig("cct-7/3x1"), "image_classification", settings={"num_labels": 10})
    layer, (convolution,) = model.layers[3], model.tokenizer.convolutions
    assert float(model.positions.std()) == pytest.approx(0.2, rel=0.02)
    assert float(layer.up.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(convolution.weight.std()) == pytest.approx((2 / 27) ** 0.5, rel=0.03)  # He's, by 27 inputs
    assert not layer.up.bias.any() and bool((layer.norm_stream.weight == 1).all())
    assert convolution.bias is None and layer.attention.q_proj.bias is None and layer.attention.o_proj.bias is not None


@torch.no_grad()
def test_stochastic_depth_rises_layer_by_layer_and_keeps_the_mean():
    model = cct(num_hidden_layers=5, drop_path_rate=0.4)
    assert [layer.drop_path for layer in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    layer = model.layers[-1].train()
    torch.manual_seed(0)
    branch = torch.ones(20_000, 2, 3, dtype=torch.float64)
    kept = layer._kept(branch)
    assert set(kept.flatten().tolist()) == {0.0, 1 / 0.6}
    assert bool((kept == kept[:, :1, :1]).all())  # a picture as a whole
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval()._kept(branch), branch)
    assert CCTForImageClassification(CCTConfig(num_hidden_layers=1)).layers[0].drop_path == 0


# -- as a Hugging Face model ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    model = cct(id2label={0: "cat", 1: "dog", 2: "frog"})
    pictures = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    swap_attention(model, "ast", {"block_size": 2, "min_blocks": 1, "density": 0.5})
    logits = model(pictures).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="sdpa").double().eval()
    assert isinstance(again, CCTForImageClassification) and again.config.id2label[2] == "frog"
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 9
    handle = swap_attention(again, "ast", {"block_size": 2, "min_blocks": 1, "density": 0.5})
    assert any("the 6 tensors of attention 'ast' come from" in note for note in handle.notes)
    torch.testing.assert_close(again(pictures).logits, logits, rtol=0, atol=0)


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model = cct(num_hidden_layers=3, drop_path_rate=0.5, attention_dropout=0.0).train()
        if checkpointed:
            name = "activation_checkpointing_enable"  # what transformers 5.23 calls it
            (getattr(model, name, None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
        torch.manual_seed(3)
        model(torch.ones(4, 3, 12, 12, dtype=torch.float64), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append(model.positions.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-15)


# -- attentions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 32], ids=["36-tokens", "64-tokens"])
@pytest.mark.parametrize("name", [name for name, row in registered().items() if row.source == "astbench"])
def test_every_attention_takes_a_batch_of_pictures(name, size):
    can = make_config(name, {}).can
    torch.manual_seed(0)
    model = CCTForImageClassification(CCTConfig(image_size=size)).train()
    tokens = model.config.max_position_embeddings
    problems = can.problems("bidirectional_self", num_heads=2, num_kv_heads=2, head_dim=64, length=tokens)
    if problems:
        with pytest.raises(CapabilityError):
            swap_attention(model, name)
        pytest.skip(f"{name}: {'; '.join(problems)}")
    handle = swap_attention(model, name)
    assert len(handle.slots) == 2
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with handle.collecting_stats() as slots:
        out = model(pixel_values=pictures, labels=torch.tensor([0, 1]))
        assert all(slot.stats is not None and float(slot.stats.density.mean()) > 0 for slot in slots)
    assert out.logits.shape == (2, 2) and bool(out.logits.isfinite().all())
    (out.loss + sum(handle.losses().values())).backward()
    assert bool(model.positions.grad.isfinite().all()) and float(model.positions.grad.abs().max()) > 0


@torch.no_grad()
def test_dense_is_the_models_own_attention():
    model, pictures = cct(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    own = model(pictures).logits
    handle = swap_attention(model, "dense")
    torch.testing.assert_close(model(pictures).logits, own, rtol=0, atol=1e-12)
    handle.undo()
    swap_attention(model, "local", {"window": 1})
    assert (model(pictures).logits - own).abs().max() > 1e-3
