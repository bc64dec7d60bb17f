"""Operations counted, against what they are by hand; and that counting changes nothing."""

import pytest
import torch

from astbench import swap_attention
from astbench.backbones.flop_count import BACKWARD, FlopCount
from tests.astbench.conftest import VOCABULARY, tiny_model

BATCH, LENGTH = 2, 29
AST = {"block_size": 4, "min_blocks": 2, "density": 0.3}


def counted(name, options=None, *, training=False, checkpointing=False):
    model = tiny_model("llama")
    handle = swap_attention(model, name, options or {})
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def run():
        torch.manual_seed(0)  # distillation draws the rows that it looks at
        model.zero_grad()
        model.train(training)
        if not training:
            with torch.inference_mode(), handle.collecting_stats() as slots:
                out = [model(input_ids=ids, use_cache=False).logits]
                return out, [slot.stats for slot in slots]
        loss = model(input_ids=ids, use_cache=False).logits.square().mean() + sum(handle.losses().values())
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], []

    plain, _ = run()
    count = FlopCount(handle)
    with count.counting():
        again, stats = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), "counting changed a result"
    return model.config, count.work, stats


def linear_layers(config):
    """Of a forward pass, by hand."""
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width * width + 2 * width * kv + 3 * width * config.intermediate_size
    return 2 * BATCH * LENGTH * (config.num_hidden_layers * layer + width * VOCABULARY)


def test_dense_attention_is_charged_for_the_pairs_that_its_mask_shows():
    config, work, _ = counted("dense")
    pairs = BATCH * config.num_attention_heads * config.num_hidden_layers * LENGTH * (LENGTH + 1) / 2
    assert work.model == linear_layers(config)
    assert (work.attending, work.beside) == (pairs * 4 * config.head_dim, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_of_dense(checkpointing):
    config, work, _ = counted("dense", training=True, checkpointing=checkpointing)
    _, forward, _ = counted("dense")
    passes = 4 if checkpointing else 3
    expected = passes * linear_layers(config)
    if checkpointing:  # what follows the layers is not run again, nor is a layer's last matmul: nobody asks for it
        last = config.num_hidden_layers * config.intermediate_size * config.hidden_size
        expected -= 2 * BATCH * LENGTH * (config.hidden_size * VOCABULARY + last)
    assert work.model == expected
    assert work.attending == forward.attending * (BACKWARD + passes - 2)


def test_the_sparse_kernel_is_charged_for_its_lists_whatever_a_backend_computes():
    for backend in ("gather", "reference"):
        config, work, stats = counted("random_topk", {**AST, "backend": backend})
        assert work.model == linear_layers(config) and work.beside == 0
        assert work.attending == 4 * config.head_dim * sum(float(one.attended.sum()) for one in stats)


def test_carried_lists_are_charged_for_whole_tiles():
    carried = {**AST, "lists": "carried", "query_tile": 8}
    config, work, stats = counted("random_topk", carried)
    tiles = sum(
        float(one.layout.tiles(causal=True)[0].sum()) * BATCH / one.layout.indices.shape[0] * config.num_attention_heads
        / one.layout.indices.shape[1]
        for one in stats
    )  # fmt: skip
    assert work.attending == 4 * config.head_dim * tiles * 8 * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kernel_has_one_backward_pass(checkpointing):
    _, forward, _ = counted("random_topk", AST)
    _, work, _ = counted("random_topk", AST, training=True, checkpointing=checkpointing)
    # Random blocks: another draw in training, of as many.
    assert work.attending == pytest.approx(forward.attending * (BACKWARD + (2 if checkpointing else 1)), rel=0.05)


def test_choosing_and_learning_to_choose_stand_apart():
    config, forward, _ = counted("ast", AST)
    _, training, _ = counted("ast", AST, training=True)
    _, blind, _ = counted("ast", {**AST, "distill_weight": 0.0}, training=True)
    assert forward.model == linear_layers(config) and training.model == 3 * forward.model == blind.model
    assert 0 < forward.beside < blind.beside < training.beside
    assert training.attending == blind.attending


def test_attention_without_pairs_is_counted_as_it_computes():
    _, work, _ = counted("linear")
    assert work.attending == 0 < work.beside
