"""What a swap takes from the model, and what becomes of it when the model is saved, checkpointed or switched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    EncoderDecoderModel,
)

from astbench import swap_attention
from astbench.backbones.hooks import LEFT_OUT
from astbench_registry import CapabilityError
from tests.astbench.conftest import tiny_model

AST = {"block_size": 4, "min_blocks": 2, "distill_fraction": 1.0}
IDS = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(1))


def mla(value_dim):
    """Multi-head latent attention: values of another size than keys (8 + 8 numbers)."""
    config = DeepseekV3Config(
        vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=value_dim, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["ast", "nsa", "ssa", "moba"])
def test_values_narrower_than_keys(name):
    model = mla(value_dim=12)
    options = {"nsa": {"block_size": 4, "top_k": 3, "window": 8, "compress_size": 4, "compress_stride": 4}}
    handle = swap_attention(model, name, options.get(name, {}))
    shape = handle.slots[0].attention.shape
    assert (shape.head_dim, shape.hidden_size) == (16, 24)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["ast", "nsa", "ssa"])
def test_values_wider_than_keys_are_refused_where_they_cannot_be_taken(name):
    model = mla(value_dim=20)
    with pytest.raises(CapabilityError, match="values no wider than keys, got 20 and 16"):
        swap_attention(model, name)
    assert model(IDS).logits.isfinite().all()  # as it was


def test_sizes_are_those_of_each_stack():
    torch.manual_seed(0)
    common = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    encoder = BertModel(BertConfig(hidden_size=24, max_position_embeddings=64, **common))
    decoder = BertLMHeadModel(
        BertConfig(hidden_size=32, max_position_embeddings=48, is_decoder=True, add_cross_attention=True, **common)
    )
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    handle = swap_attention(model, "dense")
    sizes = {slot.path: slot.attention.shape for slot in handle.slots}
    assert {(s.hidden_size, s.max_positions) for path, s in sizes.items() if path.startswith("encoder")} == {(24, 64)}
    assert {(s.hidden_size, s.max_positions) for path, s in sizes.items() if path.startswith("decoder")} == {(32, 48)}
    swapped = model(IDS, decoder_input_ids=IDS[:, :20]).logits
    handle.undo()
    torch.testing.assert_close(model(IDS, decoder_input_ids=IDS[:, :20]).logits, swapped)


@pytest.mark.parametrize("name", ["ast", "dense"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_survive_checkpointing_or_an_error_names_it(name, reentrant):
    def gradients(**checkpointing):
        model = tiny_model("llama").train()
        handle = swap_attention(model, name, AST if name == "ast" else {})
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(checkpointing)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        losses, kept = handle.losses(), [slot.losses for slot in handle.slots]
        (loss + sum(losses.values())).backward()
        # Not those of layers that checkpointing repeats: they would keep each layer's graph until the next step.
        assert all(slot.losses is first for slot, first in zip(handle.slots, kept, strict=True))
        return {k: float(x.detach()) for k, x in losses.items()}, [p.grad.clone() for p in handle.parameters()]

    plain, plain_grads = gradients()
    if name == "ast" and reentrant:
        with pytest.raises(CapabilityError, match="use_reentrant"):
            gradients(use_reentrant=True)
        return
    losses, grads = gradients(use_reentrant=reentrant)
    assert losses == plain
    torch.testing.assert_close(grads, plain_grads)


def test_a_training_step_after_one_without_gradients_is_no_recomputation():
    model = tiny_model("llama").train()
    handle = swap_attention(model, "ast", AST)
    with torch.no_grad():
        model(IDS)
    loss = model(IDS, labels=IDS).loss
    (loss + sum(handle.losses().values())).backward()
    assert handle.losses()


def trained(folder, **limits):
    """A model whose attention's weights are no longer those that it begins with, saved."""
    model = tiny_model("llama")
    handle = swap_attention(model, "ast", AST)
    torch.manual_seed(9)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **limits)
    return model


@pytest.mark.parametrize("limits", [{}, {"max_shard_size": "10KB"}], ids=["one-file", "shards"])
def test_saved_weights_come_back_with_the_swap(tmp_path, limits):
    model = trained(tmp_path, **limits)
    assert bool(limits) == (tmp_path / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    handle = swap_attention(again, "ast", AST)
    assert any(str(tmp_path) in note and "come from" in note for note in handle.notes)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    handle.undo()
    assert again.config.astbench["attention"] == "ast"  # what the file says, as before the swap


@pytest.mark.parametrize("change", ["other-attention", "other-options", "no-file", "damaged", "path"])
def test_what_cannot_come_back_is_said(tmp_path, change):
    trained(tmp_path, max_shard_size="10KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    name, options = "ast", dict(AST)
    index = tmp_path / "model.safetensors.index.json"
    if change == "other-attention":
        name, options = "seer", {}
    elif change == "other-options":
        options["rank"] = 5
    elif change == "no-file":
        for file in [*tmp_path.glob("*.safetensors"), index]:
            file.unlink()
    elif change == "damaged":
        index.write_text("[]")
    else:
        found = json.loads(index.read_text())
        found["weight_map"] = {key: f"../{file}" for key, file in found["weight_map"].items()}
        index.write_text(json.dumps(found))
    notes = swap_attention(again, name, options).notes
    assert any("start anew" in note for note in notes)


def test_a_model_that_was_never_swapped_has_nothing_to_say(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [note for note in swap_attention(again, "ast", AST).notes if "anew" in note or "come from" in note]


def test_weights_of_another_dtype_come_back_in_the_models(tmp_path):
    trained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: x.bfloat16() for k, x in load_file(file).items()}, file, metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    handle = swap_attention(again, "ast", AST)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}


def test_the_bare_implementation_name_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="astbench")
    with pytest.raises(CapabilityError, match="swap_attention"):
        bare(IDS)


def test_after_an_undo_nothing_is_left():
    model = tiny_model("llama")
    before = model(IDS).logits
    handle = swap_attention(model, "ast", AST, layers=[1])
    left_out = [m for m in model.modules() if hasattr(m, LEFT_OUT)]
    assert len(left_out) == 2
    with pytest.raises(CapabilityError, match="undo"):
        model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "astbench" and model.config.astbench["attention"] == "ast"
    handle.undo()
    assert not [m for m in left_out if hasattr(m, LEFT_OUT)] and not hasattr(model.config, "astbench")
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IDS).logits, before)
