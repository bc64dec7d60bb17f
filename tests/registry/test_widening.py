"""Parameters in half precision: gradients are finite where dense attention's are."""

import pytest
import torch

from astbench_registry import AttentionContext
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.widening import widened
from tests.oracles import HIDDEN, draw
from tests.registry.building import build

LENGTH = 33


def gradients(name, options, scale):
    (q, k, v, hidden), _ = draw(LENGTH, hidden=HIDDEN)
    module = build(name, options, hidden=HIDDEN, longest=LENGTH, dtype=torch.float16)
    inputs = [(x * s).half().requires_grad_() for x, s in zip((q, k, v, hidden), (scale, scale, 1, scale), strict=True)]
    got = module(*inputs[:3], AttentionMask("causal_self"), context=AttentionContext(hidden_states=inputs[3]))
    (got.out.float().square().sum() + sum(x.float() for x in got.losses.values())).backward()
    return {**dict(module.named_parameters()), **dict(zip("qkvh", inputs, strict=True))}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ast", {"block_size": 4, "min_blocks": 2, "density": 0.3, "distill_fraction": 1.0}),
        ("seer", {"block_size": 4}),
        ("dsa", {"top_k": 5}),
        ("sinkhorn", {"block_size": 4}),
        ("dense", {}),
    ],
)
def test_gradients_in_half_precision_are_finite(name, options):
    for label, x in gradients(name, options, 5000.0).items():
        assert x.grad is None or x.grad.isfinite().all(), label


def test_what_its_dtype_cannot_hold_becomes_the_largest_number():
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float16, requires_grad=True)
    (widened(weight, torch.float32) * torch.tensor([1e6, 1e6, 0.5]) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
    assert weight.grad.tolist() == [65504.0, -65504.0, 0.5]
    wide = torch.ones(2, requires_grad=True)
    assert widened(wide, torch.float32) is wide
