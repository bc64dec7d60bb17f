"""log3bit against the definition in plain numpy, value by value."""

import itertools
import math

import numpy as np
import pytest
import torch

from astbench_registry import AttentionMask, AttentionShape, build_attention
from astbench_registry.interface import AttentionContext
from astbench_registry.transforms.conformance import rows_of_weights
from astbench_registry.transforms.log3bit import Log3bit
from astbench_registry.transforms.registry import build_transform, make_transform_config
from astbench_registry.transforms.values import ValueCounts

SHAPE = AttentionShape(3, 3, 5)


def oracle(a, threshold, bits):
    """One value: pruned below the threshold, else the middle, on the log scale, of its bin among 2^bits - 1."""
    levels = 2**bits - 1
    if threshold == 0:  # 2^bits bins from 1e-10 on, the lowest of which becomes zero
        edges = [10 ** (-10 + 10 * i / 2**bits) for i in range(1, 2**bits + 1)]
    else:
        edges = [threshold ** (1 - i / levels) for i in range(levels + 1)]
    if a < edges[0]:
        return 0.0
    for low, high in itertools.pairwise(edges):
        if a < high or high == edges[-1]:
            return math.sqrt(low * high)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("threshold", [0, 1e-4, 1e-3, 0.02])
def test_every_value_is_the_oracles(threshold, bits):
    weights, visible = rows_of_weights(seed=4)
    got = build_transform("log3bit", {"threshold": threshold, "bits": bits}, SHAPE)(weights, visible)
    wanted = np.vectorize(lambda a: oracle(a, threshold, bits))(weights.numpy())
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9, atol=0)
    assert (wanted > 0).any() and (wanted[visible.expand_as(weights).numpy()] == 0).any()


def test_three_bits_are_seven_values_and_zero():
    a = torch.logspace(-6, 0, 5000, dtype=torch.float64)[None, None, None]
    got = build_transform("log3bit", {}, AttentionShape(1, 1, 5))(a, torch.ones_like(a, dtype=torch.bool))
    found = got.unique().tolist()
    assert len(found) == 8 and found[0] == 0
    np.testing.assert_allclose(found[1:], Log3bit.levels(1e-3, 3), rtol=1e-9)
    assert found[-1] < 1 and got[..., -1].item() == found[-1]  # a = 1 lies in the highest bin


def test_pruning_alone_keeps_the_others_as_they_are():
    weights, visible = rows_of_weights()
    got = build_transform("log3bit", {"bits": 0, "threshold": 0.05}, SHAPE)(weights, visible)
    np.testing.assert_array_equal(got.numpy(), np.where(weights.numpy() >= 0.05, weights.numpy(), 0.0))


@pytest.mark.parametrize("scope", ["model", "layer", "head"])
def test_a_share_of_zeros_is_what_comes_out_of_the_values_it_was_found_on(scope):
    layers = [rows_of_weights(seed) for seed in (1, 2)]
    layers[1] = (layers[1][0].sqrt(), layers[1][1])  # larger values
    counts = []
    for weights, visible in layers:
        counts.append(ValueCounts(3))
        counts[-1].add(weights, visible)
    shares = []
    for (weights, visible), own in zip(layers, counts, strict=True):
        transform = build_transform("log3bit", {"zeros": 0.6, "scope": scope, "bits": 0}, SHAPE)
        transform.start(own, ValueCounts.sum(counts))
        got = transform(weights, visible)
        assert len(transform.facts()["thresholds"]) == (3 if scope == "head" else 1)
        shares.append(1 - got.count_nonzero((0, 2, 3)) / visible.sum())
    by_head = torch.stack(shares)
    wanted = {"model": by_head.mean(), "layer": by_head.mean(1), "head": by_head}[scope]
    assert (wanted - 0.6).abs().max() < 0.02
    if scope != "head":
        assert (by_head - 0.6).abs().max() > 0.05  # one threshold leaves heads different shares


def test_without_values_a_share_of_zeros_is_refused():
    transform = build_transform("log3bit", {"zeros": 0.8}, SHAPE)
    with pytest.raises(ValueError, match=r"--transform.zeros needs thresholds: set --backbone.calibrate"):
        transform(*rows_of_weights())


def test_dense_attention_of_quantised_weights_is_numpys():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, 17, 5, generator=g, dtype=torch.float64) * 2 for _ in range(3))
    transform = build_transform("log3bit", {"threshold": 0.01}, SHAPE)
    context = AttentionContext(transform=transform)
    got = build_attention("dense", {}, SHAPE)(q, k, v, AttentionMask("causal_self"), context=context).out
    logits = np.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(5)
    logits[..., ~np.tri(17, dtype=bool)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = np.vectorize(lambda a: oracle(a, 0.01, 3))(weights / weights.sum(-1, keepdims=True))
    np.testing.assert_allclose(got.numpy(), np.einsum("bhnm,bhmd->bhnd", weights, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "--transform.threshold must be at least 0 and below 1, got 1.0"),
        ({"zeros": 1.0}, "--transform.zeros must be between 0 and 1"),
        ({"scope": "head"}, "--transform.scope must be model without --transform.zeros"),
        ({"bits": 17}, "--transform.bits must be 0 to 16"),
        ({"bits": 2.5}, "--transform.bits must be int"),
        ({"layers": []}, "--transform.layers must be layer numbers"),
        ({"treshold": 0.1}, "transform 'log3bit' has no option 'treshold'; did you mean 'threshold'?"),
    ],
)
def test_bad_options_name_their_flag(options, message):
    with pytest.raises(ValueError) as error:
        make_transform_config("log3bit", options)
    assert message in str(error.value)
