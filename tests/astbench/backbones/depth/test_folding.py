"""Layers folded by path in Hugging Face models: families, groups, what attention reports, training, caches."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from astbench.backbones.depth.adaptive import DEPTH, AdaptiveDepth
from astbench.backbones.depth.counting import DepthCount
from astbench.backbones.depth.folding import Folded
from astbench.backbones.depth.programs import Programs, bucket
from astbench.backbones.depth.rows import take_rows
from astbench.backbones.side_by_side import SideBySide
from astbench.backbones.swap import swap_attention
from astbench_registry import AttentionMask, CapabilityError, Choice

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    **{f"{token}_token_id": number for number, token in enumerate(("pad", "bos", "eos", "cls", "sep", "mask"))},
}
FULL = ["full_attention"] * 4
ENCODERS = {
    "modernbert": {"layer_types": FULL},
    "bert": {},
    "roberta": {},
    "electra": {},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 48},
    "esm": {"position_embedding_type": "rotary"},
}
DECODERS = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "layer_types": FULL},
    "mistral": {"sliding_window": None, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}


def build(family, attention="dense", options=None, layers=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **{**ENCODERS, **DECODERS}[family]})
    auto = AutoModelForCausalLM if family in DECODERS else AutoModel
    model = auto.from_config(config, attn_implementation="sdpa").eval()
    return model, swap_attention(model, attention, options or {})


def run(model, ids, mask=None):
    if hasattr(model, "lm_head") or hasattr(model, "embed_out"):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(6, 60, (5, 11), generator=g), torch.ones(5, 11, dtype=torch.long)
    mask[1, 8:], mask[3, 4:] = 0, 0
    return ids, mask


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@torch.no_grad()
def test_families(family, batch):
    model, handle = build(family)
    plain = run(model, *batch)
    depth = AdaptiveDepth(handle, "static", {"layers": 4})
    assert torch.equal(run(model, *batch), plain), "all layers are the plain model"
    depth.undo()
    assert not hasattr(model, DEPTH) and torch.equal(run(model, *batch), plain)
    depth = AdaptiveDepth(handle, "random", {"share": 0.6})
    out = run(model, *batch)
    ran = depth.folding.last.ran
    assert len(ran.unique(dim=0)) > 1, "several paths in one batch"
    for row in range(5):
        alone = run(model, *(x[row : row + 1] for x in batch))
        assert torch.equal(depth.folding.last.ran[0], ran[row])
        real = batch[1][row].bool()
        torch.testing.assert_close(alone[0][real], out[row][real], rtol=0, atol=1e-6)


def test_what_has_no_single_stack_is_refused():
    config = AutoConfig.for_model(
        "bart", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=61,
    )  # fmt: skip
    handle = swap_attention(AutoModelForSeq2SeqLM.from_config(config, attn_implementation="sdpa"), "dense")
    with pytest.raises(CapabilityError, match=r"--depth works on encoders and on decoders; BartForConditionalGenerat"):
        AdaptiveDepth(handle, "static", {})


class Given(torch.nn.Module):
    """Says what it was told to."""

    def __init__(self, paths, like):
        super().__init__()
        self.paths, self.config = torch.tensor(paths, dtype=torch.bool), like.config
        self.name, self.watches = "given", False

    def choose(self, hidden, seen):
        self.seen = seen
        return Choice(self.paths)


def given(handle, paths):
    depth = AdaptiveDepth(handle, "static", {})
    depth.folding.policy = Given(paths, depth.policy)
    return depth


def test_a_causal_policy_sees_the_first_tokens_alone(batch):
    model, handle = build("llama")
    depth = given(handle, [[1, 1, 1, 1]] * 5)
    depth.folding.policy.config = type(depth.config)(prompt=3)
    run(model, *batch)
    assert depth.folding.policy.seen.sum(-1).tolist() == [3] * 5
    front = [torch.nn.functional.pad(x, (2, 0)) for x in batch]
    run(model, *front)
    assert depth.folding.policy.seen.int()[0].tolist() == [0, 0, 1, 1, 1] + [0] * 8


def test_losses_of_attention_are_means_over_all_inputs(batch):
    """A layer that ran for 3 of 5 inputs brings 3/5 of the loss that these three have by themselves."""
    ids = batch[0]
    model, handle = build("modernbert", "seer", {"block_size": 2})
    model.train()
    depth = given(handle, [[1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
    run(model, ids)
    found = [dict(slot.losses) for slot in handle.slots]
    assert found[1], "this attention has a loss of its own"
    depth.folding.policy.paths = torch.ones(2, 4, dtype=torch.bool)
    run(model, ids[[1, 4]])
    for name, loss in handle.slots[1].losses.items():
        torch.testing.assert_close(found[1][name], loss * 2 / 5)
    depth.folding.policy.paths = torch.tensor([[True, False, False, False]] * 2)
    run(model, ids[[1, 4]])
    assert not handle.slots[1].losses, "nothing is left of the pass before"


DRAWS = {
    "estimator": "policy_gradient",
    "block_size": 2,
    "query_group": 4,
    "min_blocks": 1,
    "top_k": 2,
    "sink_block": False,
    "distill_weight": 0.0,
}
"""Few blocks, drawn."""


def test_log_probabilities_of_attention_come_back_in_order(batch):
    model, handle = build("modernbert", "ast", DRAWS)
    model.train()
    given(handle, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    torch.manual_seed(0)
    run(model, batch[0].repeat(1, 3))
    second = handle.slots[1].log_prob
    assert second.shape == (5,) and (second != 0).tolist() == [False, True, False, True, True]
    assert handle.slots[2].log_prob is None and handle.log_prob().shape == (5,)


def test_global_tokens_follow_their_inputs(batch):
    ids = batch[0]
    model, handle = build("bert", "longformer", {"window": 2})
    marked = torch.zeros(5, 11, dtype=torch.bool)
    marked[torch.arange(5), torch.arange(5)] = True
    policy = given(handle, [[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).folding.policy
    handle.set_global_tokens(marked)
    out, paths = run(model, ids), policy.paths
    for row in range(5):
        policy.paths = paths[row : row + 1]
        handle.set_global_tokens(marked[row : row + 1])
        torch.testing.assert_close(run(model, ids[row : row + 1])[0], out[row], rtol=0, atol=1e-6)
    handle.set_global_tokens(marked)
    policy.paths = paths
    assert torch.equal(run(model, ids), out)
    assert torch.equal(handle.slots[0].global_tokens, marked), "put back as they were"
    handle.set_global_tokens(None)
    assert not torch.allclose(run(model, ids), out)


def test_training_reaches_the_policy_and_the_layers_that_ran(batch):
    model, handle = build("modernbert")
    model.train()
    depth = AdaptiveDepth(handle, "transformer_inverse", {"distill": 1.0, "start": 0.5})
    torch.manual_seed(2)
    each = run(model, *batch).square().mean((1, 2))
    ran = depth.folding.last.ran
    assert depth.folding.last.distance[ran.all(-1)].sum() == 0, "the full depth is no distance from itself"
    assert (depth.folding.last.distance[~ran.all(-1)] > 0).all()
    found = depth.losses(each)
    assert set(found) == {"complexity", "policy", "distill"}
    (each.mean() + sum(found.values())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in depth.own_parameters())
    assert depth.losses(each) == {}, "once a pass"
    run(model, *batch)
    with pytest.raises(ValueError, match="depth 'transformer_inverse' ran 5 inputs, and 2 losses came of them"):
        depth.losses(each[:2])


def test_a_gate_has_the_gradient_of_its_layers_contribution(batch):
    """Straight through: d loss / d gate = <d loss / d output, output - input> of a layer that ran."""
    model, handle = build("modernbert")
    model.train()
    depth = AdaptiveDepth(handle, "transformer_inverse", {"estimator": "straight_through", "start": 0.99})
    kept = {}
    choose = depth.policy.choose

    def choosing(hidden, seen):
        kept["choice"] = choose(hidden, seen)
        kept["choice"].gates.retain_grad()
        return kept["choice"]

    depth.policy.choose = choosing
    inner = depth.folding._forward[3]

    def last_layer(hidden, *args, **kwargs):
        kept["before"] = hidden
        kept["after"] = inner(hidden, *args, **kwargs)
        kept["after"].retain_grad()
        return kept["after"]

    depth.folding._forward[3] = last_layer
    torch.manual_seed(0)
    run(model, batch[0]).pow(3).sum().backward()
    assert depth.folding.last.ran.all(), "one group, so that rows are the batch's"
    wanted = (kept["after"].grad * (kept["after"] - kept["before"])).sum((1, 2))
    torch.testing.assert_close(kept["choice"].gates.grad[:, 3], wanted.detach(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_keeps_the_path_of_the_prompt(batch):
    model, handle = build("llama")
    plain = model.generate(batch[0][:1], max_new_tokens=4, do_sample=False)
    depth = given(handle, [[1, 0, 1, 0]])
    out = model.generate(batch[0][:1], max_new_tokens=4, do_sample=False)
    ids = batch[0][:1]
    for _ in range(4):
        ids = torch.cat([ids, run(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids) and not torch.equal(out, plain)
    depth.undo()
    assert torch.equal(model.generate(batch[0][:1], max_new_tokens=4, do_sample=False), plain)


@torch.no_grad()
def test_what_a_cache_cannot_hold_is_refused(batch):
    model, handle = build("llama")
    started = model(batch[0][:1], use_cache=True).past_key_values
    depth = given(handle, [[1, 0, 1, 0]])
    with pytest.raises(CapabilityError, match="this KV cache was not begun with it"):
        model(batch[0][:1, :1], past_key_values=started)
    with pytest.raises(CapabilityError, match="does not run several caches side by side"):
        model(batch[0][:2, :1], past_key_values=SideBySide([started, started]), position_ids=torch.zeros(2, 1).long())
    depth.folding.policy.paths = torch.tensor([[True, False, True, False], [True, True, True, False]])
    with pytest.raises(CapabilityError, match=r"takes one sequence at a time: these 2 have different paths"):
        model(batch[0][:2], use_cache=True)
    run(model, batch[0][:2])
    depth.folding.policy.paths = torch.tensor([[False, False, True, False]])
    with pytest.raises(CapabilityError, match="needs the first layer in every path"):
        model(batch[0][:1], use_cache=True)
    depth.undo()
    AdaptiveDepth(handle, "early_exit", {})
    with pytest.raises(CapabilityError, match="decides on the way and cannot write with a KV cache"):
        model(batch[0][:1], use_cache=True)


@torch.no_grad()
def test_full_depth_asks_nobody(batch):
    model, handle = build("bert")
    plain = run(model, *batch)
    depth = AdaptiveDepth(handle, "static", {"layers": 1})
    with depth.full_depth():
        assert torch.equal(run(model, *batch), plain)
    assert not torch.allclose(run(model, *batch), plain)


def test_programs_are_kept_up_to_a_bound(capsys):
    made = []
    programs = Programs(2, lambda path: made.append(path) or (lambda: path))
    small, large = (5, 9), (8, 16)
    asked = (((0,), small), ((0,), large), ((1,), small), ((0,), (7, 12)), ((2,), small), ((1,), small))
    for path, shape in asked:
        assert programs.get(path, shape)() == path
    assert made == [(0,), (1,), (2,), (1,)], "sizes up to a power of two share; the one used longest ago went"
    assert programs.facts() == {"hits": 2, "misses": 4, "dropped": 2, "kept": 2, "most": 2}
    said = capsys.readouterr().out
    assert said.count("need more than 2 programs") == 1 and "raise --depth.programs" in said
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_rows_of_whatever_a_layer_is_called_with():
    rows = torch.tensor([2, 0])
    valid = torch.tensor([[True, False], [True, True], [False, True]])
    of_batch, of_one = torch.arange(6).view(3, 2), torch.arange(2).view(1, 2)
    found = take_rows(
        {"pair": (of_batch, of_one), "mask": AttentionMask(key_valid=valid), "list": [of_batch], "flag": True}, rows, 3
    )
    assert found["pair"][0].tolist() == [[4, 5], [0, 1]] and found["pair"][1] is of_one
    assert found["mask"].key_valid.tolist() == [[False, True], [True, False]] and found["mask"].query_valid is None
    assert found["list"][0].tolist() == [[4, 5], [0, 1]] and found["flag"] is True


def test_counts_add_up():
    ran = torch.tensor([[True, False, True], [True, True, True], [True, False, True]])
    one, two = DepthCount(), DepthCount()
    said = one.add(Folded(Choice(ran, complexity=torch.tensor([1.0, 2.0, 3.0])), ran))
    assert said[1] == {"path": "111", "complexity": 2.0}
    two.add(Folded(Choice(ran[:1]), ran[:1]))
    found = (one + two).summary((0.5, 0.25, 0.25))
    assert found["inputs"] == 4 and found["histogram"] == [0, 0, 3, 1] and found["use"] == [1.0, 0.25, 1.0]
    assert found["mean_layers"] == pytest.approx(2.25) and found["share"] == pytest.approx(0.8125)
    assert found["paths"] == 2 and found["most_frequent"] == {"101": 3, "111": 1} and found["complexity"] == 2.0
