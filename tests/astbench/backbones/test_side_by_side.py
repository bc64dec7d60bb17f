"""Several sequences in one pass, each over its own cache: what each gives alone, whoever comes and goes."""

import pytest
import torch
from transformers import DynamicCache

from astbench import swap_attention
from astbench.backbones.side_by_side import SideBySide
from astbench_registry.registry import config_class
from tests.astbench.conftest import VOCABULARY, tiny_model

LENGTHS = (9, 17, 4)
CARRIED = {"lists": "carried", "query_tile": 6}


def written(model, together):
    """Logits of every step of each sequence; they begin two steps apart, and the first one leaves early."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in LENGTHS]
    caches, last, found = {}, {}, [[] for _ in prompts]

    def keep(row, logits):
        found[row].append(logits)
        last[row] = int(logits.argmax())

    for step in range(12):
        if step % 2 == 0 and step // 2 < len(prompts):
            row = step // 2
            caches[row] = DynamicCache(config=model.config)
            keep(row, model(prompts[row], past_key_values=caches[row], use_cache=True).logits[0, -1])
        rows = [row for row in caches if row or step < 7]
        ids = torch.tensor([[last[row]] for row in rows])
        positions = torch.tensor([[caches[row].get_seq_length()] for row in rows])
        if together:
            cache = SideBySide([caches[row] for row in rows])
            logits = model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]
        else:
            each = [model(ids[n : n + 1], past_key_values=caches[row]) for n, row in enumerate(rows)]
            logits = torch.cat([out.logits[:, -1] for out in each])
        for row, one in zip(rows, logits, strict=True):
            keep(row, one)
    return [torch.stack(one) for one in found]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "dense", {}),
        ("llama", "ast", {}),
        ("llama", "ast", CARRIED),
        ("gpt2", "ast", CARRIED),
        ("qwen3", "moba", CARRIED),
        ("llama", "synthesizer", {}),  # reads the layer's input too
    ],
)
def test_each_is_as_alone(family, name, options):
    model = tiny_model(family)
    swap_attention(model, name, {**config_class(name).conformance_options, **options})
    for together, alone in zip(written(model, True), written(model, False), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_layers_that_nothing_is_attached_to():
    model = tiny_model("llama")
    swap_attention(model, "ast", config_class("ast").conformance_options, layers=[1])
    for together, alone in zip(written(model, True), written(model, False), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
