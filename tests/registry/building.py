"""What tests of variants share: one layer of a variant, and the conformance suite as a test."""

import pytest
import torch

from astbench_registry import AttentionShape, build_attention
from astbench_registry.conformance import check
from tests.oracles import DIM, HEADS, KV_HEADS


def build(
    name, options=None, *, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, layer=0, hidden=0, longest=0, train=True,
    weights=None, seed=0, dtype=torch.float64,
):  # fmt: skip
    """One layer of a variant.

    Args:
        name: What `--attention` takes.
        options: Of the variant.
        heads, kv_heads, dim, layer, hidden, longest: The layer's shape and place.
        train: Whether it is in training mode, as torch builds it.
        weights: Standard deviation of parameters drawn anew, so that none is at its start; `None`: as they start.
        seed: Of the parameters. The caller's random state stays as it is.
        dtype: Of the parameters.
    """
    shape = AttentionShape(heads, kv_heads, dim, layer_index=layer, hidden_size=hidden, max_positions=longest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_attention(name, options or {}, shape).to(dtype)
    if weights is not None:
        redraw(module, weights, seed)
    return module.train(train)


@torch.no_grad()
def redraw(module, weights, seed=0):
    """Other parameters, normal with this standard deviation."""
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=parameter.dtype) * weights)


def assert_conforms(name, options=None, property=None):
    """One property of the conformance suite holds, or all; skipped, with the reasons, where none applies."""
    results = check(name, options, properties=None if property is None else [property])
    failures = [f"{r.property}, {r.pattern}: {r.detail}" for r in results if r.status == "fail"]
    assert not failures, "\n".join(failures)
    if all(r.status == "skip" for r in results):
        reasons = {r.detail for r in results} or {"it has none of the patterns"}
        pytest.skip(f"{name}: {', '.join(sorted(reasons))}")
