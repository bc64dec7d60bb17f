"""Prompts padded on the left, as `generate` needs them in a batch, give what each prompt gives alone."""

import pytest
import torch

from astbench import swap_attention
from astbench_registry.registry import config_class, registered
from tests.astbench.conftest import tiny_model

PROMPT, BLOCK = 61, 4
CAUSAL = [n for n in sorted(registered()) if "causal_self" in config_class(n).capabilities.patterns]


def padded(ids, fronts):
    """A batch of the same prompt behind different paddings, and its mask and positions as `generate` makes them."""
    longest = max(fronts)
    batch = torch.cat(
        [torch.cat([torch.zeros(1, n).long(), ids, torch.ones(1, longest - n).long()], 1) for n in fronts]
    )
    column = torch.arange(batch.shape[1])
    mask = torch.stack([(column >= n) & (column < n + ids.shape[1]) for n in fronts]).long()
    return batch, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_the_prompt_alone(name):
    model = tiny_model("llama")
    ids = torch.randint(3, 61, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    heads = {} if config_class(name).capabilities.gqa else {"num_key_value_heads": 6}
    if heads:
        model = tiny_model("llama", **heads)
    handle = swap_attention(model, name, config_class(name).conformance_options)
    fronts = [0, 1, BLOCK - 1, BLOCK, 37]
    batch, mask, positions = padded(ids, fronts)
    with torch.no_grad():
        alone = model(ids).logits[0]
        together = model(batch, attention_mask=mask, position_ids=positions).logits
    for row, front in enumerate(fronts):
        torch.testing.assert_close(together[row, front : front + PROMPT], alone, rtol=0, atol=1e-4)
    handle.undo()


@pytest.mark.parametrize("name", ["ast", "moba", "sparse", "synthesizer"])
def test_the_same_tokens_are_generated(name):
    model = tiny_model("llama")
    ids = torch.randint(3, 61, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    handle = swap_attention(model, name, config_class(name).conformance_options)
    alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, PROMPT:]
    left = torch.cat([torch.zeros(1, 37).long(), ids], 1)
    batch = torch.cat([left, torch.cat([ids[:, :37], ids], 1)])
    mask = (batch > 0).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert together[0, left.shape[1] :].tolist() == alone.tolist()
    handle.undo()
