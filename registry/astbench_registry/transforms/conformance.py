"""The conformance suite of transforms: what every one must do, whoever wrote it.

One implementation for pytest and for `astbench check NAME`, on random rows of weights in float64 and float32, and in
dense attention. What its options declare is held against what it does.

>>> from astbench_registry.transforms.conformance import check_transform
>>> {result.status for result in check_transform("log3bit", properties=["hidden_pairs"])}
{'pass'}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astbench_registry.findings import Failure, Finding, Skip, findings
from astbench_registry.interface import AttentionContext, AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.registry import build_attention
from astbench_registry.transforms.applied import different_values
from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.interface import Transform
from astbench_registry.transforms.registry import (
    build_transform,
    make_transform_config,
    transform_config_class,
)
from astbench_registry.transforms.values import ValueCounts

# Sizes differ, so that a swapped axis shows.
BATCH, HEADS, ROWS, KEYS, HEAD_DIM = 2, 3, 23, 31, 5
SHAPE = AttentionShape(HEADS, HEADS, HEAD_DIM, layer_index=1, num_layers=3)

Factory = Callable[[TransformConfig, AttentionShape], Transform]


@dataclass(frozen=True)
class Subject:
    """What is under test."""

    factory: Factory
    config: TransformConfig

    def build(self, *, started: bool = True) -> Transform:
        """For one layer; where it is calibrated, from values of other weights."""
        transform = self.factory(self.config, SHAPE)
        if started and self.config.calibrated:
            counts = ValueCounts(HEADS)
            for seed in (11, 12):
                counts.add(*rows_of_weights(seed))
            transform.start(counts, ValueCounts.sum([counts]))
        return transform


Property = Callable[[Subject], None]


def rows_of_weights(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Softmax rows `(batch, heads, rows, keys)` of logits of many sizes, and what is visible in them.

    Causal, with holes; the last row of the first sequence sees nothing.
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, HEADS, ROWS, KEYS, generator=g, dtype=torch.float64)
    logits = logits * torch.tensor([0.5, 3.0, 12.0]).double()[:HEADS, None, None]
    visible = torch.arange(KEYS) <= torch.arange(ROWS)[:, None] + KEYS - ROWS
    visible = visible & (torch.rand(BATCH, 1, 1, KEYS, generator=g) > 0.2)
    visible[0, :, -1] = False
    weights = logits.masked_fill(~visible, torch.finfo(torch.float64).min).softmax(-1).masked_fill(~visible, 0.0)
    return weights.to(dtype), visible


def interface(subject: Subject) -> None:
    """Shape and dtype stay, everything is finite, and the given weights are not written into."""
    transform = subject.build()
    for dtype in (torch.float64, torch.float32):
        weights, visible = rows_of_weights(dtype=dtype)
        before = weights.clone()
        after = transform(weights, visible)
        _demand(isinstance(after, Tensor), f"returns {type(after).__name__}, not a tensor")
        _demand(after.shape == before.shape, f"weights {tuple(before.shape)} become {tuple(after.shape)}")
        _demand(after.dtype == before.dtype, f"weights in {before.dtype} become {after.dtype}")
        _demand(bool(after.isfinite().all()), "a weight is not finite")
        _demand(torch.equal(weights, before), "the call writes into the weights that it was given")


def hidden_pairs(subject: Subject) -> None:
    """Pairs that the mask hides, and rows that see nothing, stay zero."""
    weights, visible = rows_of_weights()
    after = subject.build()(weights, visible)
    _demand(not bool((after.masked_fill(visible, 0.0) != 0).any()), "a hidden pair has weight")


def between_0_and_1(subject: Subject) -> None:
    """Weights stay at 0 or above, and none above 1."""
    after = subject.build()(*rows_of_weights())
    _demand(bool((after >= 0).all()), f"a weight of {float(after.min()):.3g}")
    _demand(bool((after <= 1 + 1e-9).all()), f"a weight of {float(after.max()):.3g}")


def rows_apart(subject: Subject) -> None:
    """A row's result depends on no other row, and on no other sequence."""
    transform, (weights, visible) = subject.build(), rows_of_weights()
    whole = transform(weights, visible)
    for start, stop in ((0, 1), (1, 8), (8, ROWS)):
        part = transform(weights[:, :, start:stop], visible[:, :, start:stop])
        _same(part, whole[:, :, start:stop], f"rows {start} to {stop - 1} alone give something else")
    for one in range(BATCH):
        part = transform(weights[one : one + 1], visible[one : one + 1])
        _same(part, whole[one : one + 1], f"sequence {one} alone gives something else")


def heads_apart(subject: Subject) -> None:
    """A head's result depends on no other head."""
    transform, (weights, visible) = subject.build(), rows_of_weights()
    other = rows_of_weights(seed=5)[0].masked_fill(~visible, 0.0)
    before = transform(weights, visible)
    mixed = torch.cat([weights[:, :1], other[:, 1:]], 1)
    _same(transform(mixed, visible)[:, :1], before[:, :1], "other weights in the other heads move the first one")


def more_padding(subject: Subject) -> None:
    """Hidden keys behind the others change nothing."""
    transform, (weights, visible) = subject.build(), rows_of_weights()
    longer = transform(torch.nn.functional.pad(weights, (0, 9)), torch.nn.functional.pad(visible, (0, 9)))
    _same(longer[..., :KEYS], transform(weights, visible), "hidden keys behind the others move the weights")


def determinism(subject: Subject) -> None:
    """Twice the same gives the same; the random state stays as it is."""
    transform, given = subject.build(), rows_of_weights()
    state = torch.get_rng_state()
    first = transform(*given)
    _demand(torch.equal(torch.get_rng_state(), state), "it draws random numbers")
    transform(*rows_of_weights(seed=9))
    _demand(torch.equal(transform(*given), first), "the same weights give something else after others")


def declared_values(subject: Subject) -> None:
    """A head has no more different values than the options declare."""
    most = subject.config.most_values
    if most is None:
        raise Skip("declares no number of values")
    after = subject.build()(*rows_of_weights())
    for head in range(HEADS):
        found = different_values(after[:, head].flatten(), most)
        _demand(found is not None and len(found) <= most, f"more than the {most} values that it declares")


def calibration(subject: Subject) -> None:
    """A calibrated transform refuses weights before it has seen values, in one line that says how."""
    if not subject.config.calibrated:
        raise Skip("not calibrated")
    try:
        subject.build(started=False)(*rows_of_weights())
    except ValueError as error:
        _demand("--backbone.calibrate" in str(error), f"the refusal does not name --backbone.calibrate: {error}")
        return
    raise Failure("it changes weights before it has seen any values")


def in_attention(subject: Subject) -> None:
    """In dense causal attention no output depends on later tokens, and a step of decoding equals the full pass."""
    transform = subject.build()
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(BATCH, HEADS, ROWS, HEAD_DIM, generator=g, dtype=torch.float64) * 2 for _ in range(3))
    attention = build_attention("dense", {}, SHAPE)
    context = AttentionContext(transform=transform)
    with torch.no_grad():
        before = attention(q, k, v, AttentionMask("causal_self"), context=context).out
        for cut in (1, 7, ROWS - 1):
            q2, k2, v2 = (torch.cat([x[:, :, :cut], 3 * x[:, :, cut:].flip(0)], 2) for x in (q, k, v))
            after = attention(q2, k2, v2, AttentionMask("causal_self"), context=context).out
            _same(after[:, :, :cut], before[:, :, :cut], f"changing tokens from {cut} on moves earlier outputs")
            step = AttentionMask("causal_self", query_offset=cut)
            row = attention(q[:, :, cut : cut + 1], k[:, :, : cut + 1], v[:, :, : cut + 1], step, context=context).out
            _same(row, before[:, :, cut : cut + 1], f"decoding token {cut} alone gives something else")


TRANSFORM_PROPERTIES: dict[str, Property] = {
    function.__name__: function
    for function in (
        interface,
        hidden_pairs,
        between_0_and_1,
        rows_apart,
        heads_apart,
        more_padding,
        determinism,
        declared_values,
        calibration,
        in_attention,
    )
}
"""Name to check, in the order in which they run."""


def check_transform(
    name: str, options: Mapping[str, Any] | None = None, *, properties: Iterable[str] | None = None
) -> list[Finding]:
    """Run the suite on a registered transform, ours or a plugin's.

    Args:
        name: What `--transform` takes.
        options: Laid over the transform's `conformance_options`.
        properties: Some keys of :data:`TRANSFORM_PROPERTIES`; all by default.

    Raises:
        ValueError: an unknown name, option or property.
    """
    config = make_transform_config(name, {**transform_config_class(name).conformance_options, **(options or {})})
    return check_built(lambda config, shape: build_transform(name, config, shape), config, name, properties)


def check_built(
    factory: Factory, config: TransformConfig, name: str = "unregistered", properties: Iterable[str] | None = None
) -> list[Finding]:
    """Run the suite on whatever `factory(config, shape)` builds, registered or not."""
    return findings(name, properties, TRANSFORM_PROPERTIES, Subject(factory, config))


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise Failure(message)


def _same(actual: Tensor, expected: Tensor, what: str) -> None:
    _demand(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    worst = (actual - expected).abs().nan_to_num(nan=torch.inf).max()
    _demand(bool(worst <= 1e-10), f"{what}, by up to {float(worst):.1e}")
