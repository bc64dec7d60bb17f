"""Backbones: presets, pretrained folders, longer position tables, adapters."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForQuestionAnswering

from astbench import load_adapter, save_adapter, swap_attention
from astbench.backbones import adapters
from astbench.backbones.load import (
    extend_positions,
    load_backbone,
    locate,
    max_positions,
)
from astbench.backbones.presets import DEFAULT_FAMILY, PRESETS, BackboneConfig, resolve_preset
from astbench.backbones.tokenizers import id_tokenizer, load_tokenizer, train_bpe, train_tokenizer
from astbench.errors import CheckpointError, ConfigError, DataError, NameOrPluginError
from astbench.tasks.qa import demo as qa_demo
from tests.astbench.conftest import tiny_model

TEXTS = ["Ada Vintar was born in Rookwell.", "The Silent Orchard is a work of Bram Oster.", "In 1873 the guild met."]
AST = {"density": 0.5, "block_size": 4, "min_blocks": 1}
SMALL_BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def heads_of(preset):
    family = preset.split("-")[0]
    heads = {"llama": ["causal_lm"], "induction": ["causal_lm"], "marian": ["seq2seq"]}
    return heads.get(family, ["question_answering", "sequence_classification"])


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("cct")])
def test_every_preset_builds_and_takes_every_pattern_of_its_head(preset):
    for head in heads_of(preset):
        tokenizer = train_bpe(TEXTS, 300) if head == "seq2seq" else train_tokenizer(TEXTS, 90)
        model = load_backbone(BackboneConfig(preset), head, tokenizer=tokenizer)
        assert model.dtype == torch.float32
        assert model.config.vocab_size % 8 == 0
        assert model.config.vocab_size >= len(tokenizer)
        assert model.config.pad_token_id == tokenizer.pad_token_id
        handle = swap_attention(model, "ast")
        stacks = {"encoder": 1, "decoder": 2} if head == "seq2seq" else {"num_hidden": 1}
        assert len(handle.slots) == sum(n * getattr(model.config, f"{s}_layers") for s, n in stacks.items())


def test_induction_heads_are_there_from_the_start():
    """Untrained, the model goes on with a random sequence that comes a second time; a plain one cannot."""
    tokenizer, right = id_tokenizer(500), {}
    for preset in ("induction-tiny", "induction-small", "llama-tiny"):
        torch.manual_seed(3)
        model = load_backbone(BackboneConfig(preset), "causal_lm", tokenizer=tokenizer).eval()
        once = torch.stack([torch.randperm(500)[:40] for _ in range(8)])
        guessed = model(torch.cat([once, once], 1)).logits[:, 40:-1].argmax(-1)
        right[preset] = float((guessed == once[:, 1:]).float().mean())
    assert right["llama-tiny"] < 0.1
    assert right["induction-tiny"] > 0.6 and right["induction-small"] > 0.8


@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_heads_that_start_by_copying(size):
    """What a group of query heads that looks at a token writes back is that token's part in a subspace."""
    model = load_backbone(BackboneConfig(f"llama-copying-{size}"), "causal_lm").requires_grad_(False)
    config = model.config
    groups, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        value = layer.self_attn.v_proj.weight.view(groups, dim, -1)
        out = layer.self_attn.o_proj.weight.T.reshape(groups, -1, dim, config.hidden_size).sum(1)
        copied = out.transpose(1, 2) @ value
        torch.testing.assert_close(copied @ copied, copied, atol=1e-5, rtol=0)  # a projection
        torch.testing.assert_close(copied, copied.transpose(1, 2), atol=1e-6, rtol=0)
        assert [round(float(c.trace())) for c in copied] == [dim] * groups


@pytest.mark.parametrize(
    ("name", "head", "preset"),
    [
        ("tiny", "question_answering", "rope-bert-tiny"),
        ("small", "causal_lm", "llama-small"),
        ("bert-tiny", "question_answering", "bert-tiny"),
        ("bert-base-uncased", "question_answering", None),
        ("lra", "sequence_classification", "modernbert-lra"),
        ("./tiny", "causal_lm", None),
    ],
)
def test_names_of_presets(name, head, preset):
    assert resolve_preset(name, head) == preset


def test_default_families_have_the_short_names():
    for head in DEFAULT_FAMILY:
        assert {resolve_preset("tiny", head), resolve_preset("small", head)} <= PRESETS.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modernbert-tny", "unknown backbone 'modernbert-tny'; did you mean 'modernbert-tiny'?"),
        ("cct-7/3x2", "unknown backbone 'cct-7/3x2'; did you mean 'cct-7/3x1'?"),
        ("./nowhere", "is not a folder with a pretrained model"),
        ("/nowhere/at/all", "is not a folder with a pretrained model"),
        ("a/b/c", "is not a folder with a pretrained model"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises((ConfigError, NameOrPluginError)) as caught:
        locate(BackboneConfig(name))
    assert message in str(caught.value)


def test_hub_names_are_left_to_the_hub():
    assert locate(BackboneConfig("owner/model", revision="abc")) == ("owner/model", {"revision": "abc"})


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a config.json nor exactly one .gguf file \(0 found\)"):
        locate(BackboneConfig(str(tmp_path)))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="2 found"):
        locate(BackboneConfig(str(tmp_path)))
    assert locate(BackboneConfig(str(tmp_path), gguf_file="b.gguf")) == (str(tmp_path), {"gguf_file": "b.gguf"})


# -- positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "reserved"), [("bert", 0), ("roberta", 2), ("bart", 2)])
def test_extended_tables_repeat_the_trained_rows(family, reserved):
    model = tiny_model(family)
    old = {n: p.clone() for n, p in model.named_parameters() if "position" in n and n.endswith("weight")}
    assert max_positions(model) == 64
    extend_positions(model, 150)
    assert max_positions(model) == 150
    new = dict(model.named_parameters())
    assert old
    for name, table in old.items():
        trained = table[reserved:]
        expected = torch.cat([table, trained, trained])[: reserved + 150]
        assert torch.equal(new[name], expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "distilbert", "bart"])
def test_short_inputs_keep_their_logits_and_longer_ones_run(family):
    model = tiny_model(family)
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        extend_positions(model, 100)
        assert torch.equal(model(ids).logits, before)
        assert model(ids.repeat(1, 3)[:, :100]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["roberta", "bart", "gpt2"])
def test_extended_models_save_and_load(tmp_path, family):
    model = tiny_model(family)
    extend_positions(model, 100)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 61, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_rotary_positions_have_no_table(family):
    model = tiny_model(family, max_position_embeddings=64)
    assert max_positions(model) == 64
    with pytest.raises(ConfigError, match="no learned position table to extend"):
        extend_positions(model, 100)


@pytest.mark.parametrize("preset", ["bert-tiny", "rope-bert-tiny", "marian-tiny"])
def test_presets_take_any_length(preset):
    model = load_backbone(BackboneConfig(preset, max_positions=3000), heads_of(preset)[0])
    assert max_positions(model) == 3000
    ids = torch.ones(1, 3000, dtype=torch.long)
    targets = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert model.base_model(ids, **targets).last_hidden_state.isfinite().all()


def test_rope_bert_starts_with_heads_that_find_equal_tokens_and_heads_that_look_around():
    model = load_backbone(BackboneConfig("tiny"), "question_answering").eval()
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    half = 100
    ids = torch.randperm(1000)[:half].repeat(2)
    equal, around = model(input_ids=ids[None], output_attentions=True).attentions[0][0].detach()
    token = torch.arange(half)
    assert equal[token + half, token].mean() > 0.2  # by chance 0.005
    assert around[token + half, token].mean() < 0.005
    distance = (torch.arange(2 * half)[:, None] - torch.arange(2 * half)).abs()
    assert around[distance <= 5].mean() > 4 * around[distance > 50].mean()


# -- pretrained folders -----------------------------------------------------------------------------------


@pytest.fixture
def bert_folder(tmp_path):
    """A folder with a random tiny BERT, safetensors, and its tokenizer."""
    tokenizer = train_tokenizer(TEXTS, 90)
    torch.manual_seed(3)
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL_BERT))
    folder = tmp_path / "bert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def test_pretrained_folder_gives_its_weights_and_tokenizer(bert_folder):
    folder, saved = bert_folder
    config = BackboneConfig(str(folder), max_positions=90)
    model = load_backbone(config, "question_answering")
    assert max_positions(model) == 90
    loaded = model.state_dict()
    for name, weight in saved.state_dict().items():
        assert torch.equal(loaded[name][: len(weight)], weight), name
    assert load_tokenizer(config)("Ada")["input_ids"] == train_tokenizer(TEXTS, 90)("Ada")["input_ids"]


def test_pickled_weights_are_refused(bert_folder):
    folder, model = bert_folder
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"--backbone.name=.* cannot be loaded"):
        load_backbone(BackboneConfig(str(folder)), "question_answering")
    load_backbone(BackboneConfig(str(folder), trust_weights_only=False), "question_answering")


def test_damaged_weights_are_one_data_error(bert_folder):
    folder, _ = bert_folder
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_backbone(BackboneConfig(str(folder)), "question_answering")


def test_missing_tokenizer_is_a_data_error(bert_folder):
    folder, _ = bert_folder
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(BackboneConfig(str(folder)))


def test_trained_tokenizer_is_the_same_every_time():
    """Left to itself the trainer numbers letters in the order of a hash table, random in every call."""
    texts = [e.context for e in qa_demo.generate("train", 40)]
    first, second, third = (train_tokenizer(texts, 700).get_vocab() for _ in range(3))
    assert first == second == third
    assert len(first) == 700


def test_trained_tokenizer_lower_cases_and_knows_pairs():
    tokenizer = train_tokenizer(TEXTS, 200)
    assert tokenizer.tokenize("ADA Vintar") == tokenizer.tokenize("ada vintar")
    encoded = tokenizer("ada", "vintar")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[0] == "[CLS]"
    assert encoded["input_ids"].count(tokenizer.sep_token_id) == 2
    # Single letters are parts of words, no special tokens that would cut them.
    assert len(tokenizer.all_special_tokens) == 4
    assert tokenizer.decode(tokenizer("rookwell")["input_ids"], skip_special_tokens=True) == "rookwell"


# -- adapters -------------------------------------------------------------------------------------------------


def trained(family="bert", **options):
    """A swapped model whose variant is not in its initial state."""
    model = tiny_model(family)
    handle = swap_attention(model, "ast", {**AST, **options})
    torch.manual_seed(8)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)
    return model, handle


def test_adapter_round_trip_is_exact(tmp_path):
    model, handle = trained()
    save_adapter(handle, tmp_path / "adapter")
    again = tiny_model("bert")
    loaded = load_adapter(again, tmp_path / "adapter")
    assert loaded.name == "ast"
    assert loaded.options == handle.options
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_adapter_holds_only_the_variants_parameters(tmp_path):
    _, handle = trained()
    save_adapter(handle, tmp_path)
    weights = load_file(tmp_path / adapters.WEIGHTS)
    assert weights.keys() == handle.state_dict().keys()
    assert all(".astbench." in name for name in weights)


def test_adapter_of_some_layers(tmp_path):
    model = tiny_model("bert")
    save_adapter(swap_attention(model, "ast", AST, layers=[1]), tmp_path)
    assert len(load_adapter(tiny_model("bert"), tmp_path).slots) == 1


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"num_attention_heads": 4}])
def test_adapter_of_another_backbone_is_refused_and_undone(tmp_path, change):
    _, handle = trained()
    save_adapter(handle, tmp_path)
    other = tiny_model("bert", **change)
    with pytest.raises(CheckpointError, match="does not fit BertForMaskedLM"):
        load_adapter(other, tmp_path)
    assert other.config._attn_implementation == "sdpa"


def test_damaged_adapters_are_refused(tmp_path):
    _, handle = trained()
    save_adapter(handle, tmp_path)
    weights = tmp_path / adapters.WEIGHTS
    whole = weights.read_bytes()
    for damaged in (whole[:-5], whole[:40], b""):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_adapter(tiny_model("bert"), tmp_path)
    weights.write_bytes(whole)
    (tmp_path / adapters.DESCRIPTION).write_text(json.dumps({"attention": "ast"}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(tiny_model("bert"), tmp_path)
    (tmp_path / adapters.DESCRIPTION).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(tiny_model("bert"), tmp_path)


def test_a_flipped_bit_anywhere_in_an_adapter_is_noticed(tmp_path):
    _, handle = trained()
    save_adapter(handle, tmp_path)
    model = tiny_model("bert")
    for name in (adapters.WEIGHTS, adapters.DESCRIPTION):
        whole = (tmp_path / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 7
            (tmp_path / name).write_bytes(damaged)
            if name == adapters.DESCRIPTION and bytes(damaged).split() == whole.split():
                continue  # one space became another
            with pytest.raises(CheckpointError):
                load_adapter(model, tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert not any("unverified" in note for note in load_adapter(model, tmp_path).notes)


@pytest.mark.parametrize(
    "change",
    [
        {"options": None},
        {"options": {"density": math.nan}},
        {"options": {"density": math.inf}},
        {"options": {"block_size": True}},
        {"options": {"density": None}},
        {"where": None},
        {"where": [3]},
        {"layers": [True]},
        {"layers": True},
        {"attention": None},
        {"attention": "./evil.py:Evil"},
        {"backbone": 3},
        {"more": 1},
    ],
)
def test_an_adapter_of_before_is_checked_as_far_as_it_can_be(tmp_path, change, monkeypatch):
    _, handle = trained()
    save_adapter(handle, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('trace', 'w')\n")
    description = json.loads((tmp_path / adapters.DESCRIPTION).read_text())
    del description["sha256"]
    (tmp_path / adapters.DESCRIPTION).write_text(json.dumps(description))
    loaded = load_adapter(tiny_model("bert"), tmp_path)
    assert "is unverified" in loaded.notes[-1]
    changed = {**description, **change}
    if isinstance(changed["options"], dict) and "options" in change:
        changed["options"] = {**description["options"], **change["options"]}
    (tmp_path / adapters.DESCRIPTION).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError):
        load_adapter(tiny_model("bert"), tmp_path)
    assert not (tmp_path / "trace").exists()


def test_a_failing_save_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    _, handle = trained()
    save_adapter(handle, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("astbench.files.writing.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(trained(density=0.25)[1], tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
