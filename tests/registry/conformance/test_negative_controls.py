"""Broken attentions that the conformance suite must catch: a test that never fails proves nothing."""

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from astbench_registry import Attention, AttentionConfig, AttentionOutput, AttentionStats, Capabilities
from astbench_registry.capabilities import PATTERNS
from astbench_registry.configs.block_selection import BlockSelectionConfig, PooledTopKConfig
from astbench_registry.conformance import PROPERTIES, check_module
from astbench_registry.variants.pooled_topk import PooledTopKAttention


@dataclass(frozen=True)
class PlainConfig(AttentionConfig):
    capabilities: ClassVar = Capabilities(
        patterns=PATTERNS, decode=True, shift_invariant=True, exact_at_full_density=True
    )


@dataclass(frozen=True)
class LearnedConfig(AttentionConfig):
    capabilities: ClassVar = Capabilities(patterns=PATTERNS, decode=True, shift_invariant=True, owns_parameters=True)


class Plain(Attention):
    """Softmax attention in small replaceable steps; this one is right, its subclasses get one step wrong."""

    config_of_test = PlainConfig

    def forward(self, q, k, v, mask, *, scale=None, context=None):
        allowed = self.allowed(q, k, mask)
        q = self.hide_queries(q, mask)
        k, v = (self.repeat(self.hide(x, mask)) for x in (k, v))
        logits = self.logits(q, k, self.default_scale() if scale is None else scale)
        context_vectors = (self.weights(logits, allowed) @ v.to(logits.dtype)).to(q.dtype)
        listening = context is not None and context.collect_stats
        return AttentionOutput(context_vectors, stats=self.stats(q, allowed) if listening else None)

    def default_scale(self):
        return self.shape.head_dim**-0.5

    def allowed(self, q, k, mask):
        dense = mask.dense(q.shape[2], k.shape[2], q.device)
        everything = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
        return everything if dense is None else everything & dense

    def hide(self, x, mask):
        return x if mask.key_valid is None else x.masked_fill(~mask.key_valid[:, None, :, None], 0.0)

    def hide_queries(self, q, mask):
        valid = mask.valid_queries(q.shape[2])
        return q if valid is None else q.masked_fill(~valid[:, None, :, None], 0.0)

    def repeat(self, x):
        return x.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 1)

    def logits(self, q, k, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.to(wide) @ k.to(wide).transpose(-1, -2) * scale

    def weights(self, logits, allowed):
        logits = logits.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        return logits.softmax(-1).masked_fill(~allowed, 0.0)

    def stats(self, q, allowed):
        visible = allowed.sum((1, 2, 3)).double()
        return AttentionStats(visible[:, None].expand(-1, q.shape[1]), visible, "plain")


class SeesOneFutureToken(Plain):
    def allowed(self, q, k, mask):
        allowed = super().allowed(q, k, mask)
        if mask.causal:
            edge = torch.arange(q.shape[2])[:, None] + mask.query_offset + 1
            allowed = allowed | ((torch.arange(k.shape[2]) == edge) & allowed.any(-1, keepdim=True))
        return allowed


class LooksBackAtLaterQueries(Plain):
    """Centring the queries over the sequence: harmless when encoding, a leak when decoding."""

    def logits(self, q, k, scale):
        return super().logits(q - q.mean(2, keepdim=True), k, scale)


class ForgetsTheSquareRoot(Plain):
    def default_scale(self):
        return 1.0


class IgnoresTheScale(Plain):
    def logits(self, q, k, scale):
        return super().logits(q, k, self.shape.head_dim**-0.5)


class StabilisesOverTheBatch(Plain):
    """As Performer's features: a shared maximum is neutral but for the epsilon beside it."""

    def weights(self, logits, allowed):
        weights = (logits - logits.max()).exp().masked_fill(~allowed, 0.0)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6)


class IgnoresPadding(Plain):
    def allowed(self, q, k, mask):
        return Plain.allowed(self, q, k, type(mask)(mask.pattern, mask.query_offset))

    def hide(self, x, mask):
        return x


class IgnoresTheQueryOffset(Plain):
    def allowed(self, q, k, mask):
        return super().allowed(q, k, type(mask)(mask.pattern, 0, mask.key_valid))


class MultipliesPaddingByZero(Plain):
    def hide(self, x, mask):
        return x if mask.key_valid is None else x * mask.key_valid[:, None, :, None]


class LeavesPaddedQueries(Plain):
    """Their rows are nobody's, but in the backward pass zero times NaN is NaN for every key."""

    def hide_queries(self, q, mask):
        return q


class AveragesWhereNothingIsSeen(Plain):
    def weights(self, logits, allowed):
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)


class GradientOfAnEmptyRowIsNan(Plain):
    def weights(self, logits, allowed):
        weights = (logits + torch.where(allowed, 0.0, -torch.inf)).softmax(-1)
        return torch.where(allowed.any(-1, keepdim=True), weights, 0.0)


class TilesTheKeyHeads(Plain):
    def repeat(self, x):
        return x.repeat(1, self.shape.num_heads // self.shape.num_kv_heads, 1, 1)


class AddsNoiseWithoutSeed(Plain):
    def logits(self, q, k, scale):
        return super().logits(q, k, scale) + random.SystemRandom().random() * torch.arange(k.shape[2])


class RoundsTheLogits(Plain):
    def logits(self, q, k, scale):
        return super().logits(q, k, scale).to(q.dtype)


class StopsTheGradientOfKeys(Plain):
    def logits(self, q, k, scale):
        return super().logits(q, k.detach(), scale)


class WritesIntoItsInput(Plain):
    def forward(self, q, k, v, mask, **options):
        q.mul_(1.5)
        return super().forward(q, k, v, mask, **options)


class CountsTooMuch(Plain):
    def stats(self, q, allowed):
        visible = allowed.sum((1, 2, 3)).double()
        return AttentionStats(visible[:, None].expand(-1, q.shape[1]) + 1, visible, "plain")


class ForgetsABuffer(Plain):
    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.register_buffer("slope", torch.randn(shape.num_heads, 1, 1), persistent=False)

    def logits(self, q, k, scale):
        return super().logits(q, k, scale) + self.slope.to(q.dtype) * torch.arange(k.shape[2])


class Unreached(Plain):
    """A parameter that the forward pass never uses."""

    config_of_test = LearnedConfig

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.gain = nn.Parameter(torch.ones(shape.num_heads, 1, 1))


class ReachedWithZeroGradient(Unreached):
    """Softmax does not see a constant added to every logit."""

    def logits(self, q, k, scale):
        return super().logits(q, k, scale) + self.gain


class WrongParameterGradient(Unreached):
    def logits(self, q, k, scale):
        detour = self.gain.detach() + 0.5 * (self.gain - self.gain.detach())
        return super().logits(q, k, scale) * detour


class PoolsACausalGroup(PooledTopKAttention):
    """The group's mean query speaks, so later tokens choose for earlier ones."""

    def group_query(self, call, grid):
        group = grid.query_group
        padded = nn.functional.pad(call.q, (0, 0, 0, grid.num_groups * group - call.q.shape[2]))
        return padded.unflatten(2, (-1, group)).mean(3)


class LetsTheCurrentBlockCompete(PooledTopKAttention):
    """The mean of a block that is not complete yet is compared with the others."""

    def fusible(self, call):
        return False

    def selection(self, call):
        found = super().selection(call)
        return type(found)(**{**vars(found), "candidates": found.visible, "always_kept": found.always_kept & False})


class ReportsAnotherLayout(PooledTopKAttention):
    def forward(self, q, k, v, mask, *, scale=None, context=None):
        other = super().forward(q.flip(2), k, v, mask, scale=scale, context=context)
        return super().forward(q, k, v, mask, scale=scale, context=context)._replace(stats=other.stats)


class ScoresInHalfPrecision(PooledTopKAttention):
    def factors(self, call, features, grid):
        rows, columns = super().factors(call, features, grid)
        return rows if call.q.dtype == torch.float64 else rows.to(torch.float8_e5m2).float(), columns


CHUNK = 128


class LeaksFromTheSecondChunk(Plain):
    """In chunks of 128; all but the first see to their end."""

    def allowed(self, q, k, mask):
        allowed = super().allowed(q, k, mask)
        if mask.causal:
            row = torch.arange(q.shape[2])[:, None] + mask.query_offset
            same_chunk = torch.arange(k.shape[2]) // CHUNK == row // CHUNK
            allowed = allowed | (same_chunk & (row >= CHUNK) & allowed.any(-1, keepdim=True))
        return allowed


class ForgetsPaddingBehindTheFirstChunk(Plain):
    def allowed(self, q, k, mask):
        allowed = super().allowed(q, k, mask)
        if mask.key_valid is None:
            return allowed
        hidden = ~mask.key_valid[:, None, None, :] & (torch.arange(k.shape[2]) < CHUNK)
        return super().allowed(q, k, type(mask)(mask.pattern, mask.query_offset)) & ~hidden


class SeesTwoChunks(Plain):
    def allowed(self, q, k, mask):
        row = torch.arange(q.shape[2])[:, None] + mask.query_offset
        return super().allowed(q, k, mask) & ((row - torch.arange(k.shape[2])).abs() < 2 * CHUNK)


class RestartsAtEachChunkWhenDecoding(Plain):
    def allowed(self, q, k, mask):
        allowed = super().allowed(q, k, mask)
        if mask.sequential and mask.query_offset >= CHUNK:
            return allowed & (torch.arange(k.shape[2]) >= CHUNK)
        return allowed


class ReportsHalf(Plain):
    def stats(self, q, allowed):
        stats = super().stats(q, allowed)
        return replace(stats, attended=(stats.attended / 2).floor())


class ReportsAllButIsLocal(Plain):
    def weights(self, logits, allowed):
        rows, columns = (torch.arange(n) for n in logits.shape[-2:])
        return super().weights(logits, allowed & ((rows[:, None] - columns).abs() < 9))


class ReturnsSinglePrecision(Plain):
    def forward(self, *args, **kwargs):
        got = super().forward(*args, **kwargs)
        return got._replace(out=got.out.to(torch.promote_types(got.out.dtype, torch.float32)))


class CountsPaddingInFront(PooledTopKAttention):
    """Blocks from row 0 of the tensor, whatever lies there."""

    def __call__(self, *args, **kwargs):
        return nn.Module.__call__(self, *args, **kwargs)


MUTANTS = [
    (SeesOneFutureToken, "causality"),
    (LooksBackAtLaterQueries, "causality"),
    (LooksBackAtLaterQueries, "decode"),
    (ForgetsTheSquareRoot, "scale"),
    (ForgetsTheSquareRoot, "full_density"),
    (IgnoresTheScale, "scale"),
    (StabilisesOverTheBatch, "batch_invariance"),
    (StabilisesOverTheBatch, "empty_batch"),
    (IgnoresPadding, "padding_invariance"),
    (IgnoresPadding, "full_density"),
    (IgnoresTheQueryOffset, "decode"),
    (MultipliesPaddingByZero, "nan_memory"),
    (LeavesPaddedQueries, "nan_memory"),
    (AveragesWhereNothingIsSeen, "fully_masked"),
    (GradientOfAnEmptyRowIsNan, "fully_masked"),
    (TilesTheKeyHeads, "gqa"),
    (AddsNoiseWithoutSeed, "determinism"),
    (RoundsTheLogits, "low_precision"),
    (StopsTheGradientOfKeys, "gradients"),
    (WritesIntoItsInput, "interface"),
    (CountsTooMuch, "statistics"),
    (ForgetsABuffer, "save_load"),
    (Unreached, "parameter_gradients"),
    (ReachedWithZeroGradient, "parameter_gradients"),
    (WrongParameterGradient, "gradients"),
    (LeaksFromTheSecondChunk, "long_causality"),
    (ForgetsPaddingBehindTheFirstChunk, "long_padding"),
    (SeesTwoChunks, "long_full_density"),
    (RestartsAtEachChunkWhenDecoding, "long_decode"),
    (ReportsHalf, "density"),
    (ReportsAllButIsLocal, "density"),
    (ReturnsSinglePrecision, "low_precision"),
]
SELECTING_MUTANTS = [
    (PoolsACausalGroup, {"query_group": 4}, "causality"),
    (LetsTheCurrentBlockCompete, {}, "causality"),
    (ReportsAnotherLayout, {}, "statistics"),
    (ScoresInHalfPrecision, {}, "low_precision"),
    (CountsPaddingInFront, {}, "batch_invariance"),
]


def failures(results):
    return [r for r in results if r.status == "fail"]


@pytest.mark.parametrize("property", PROPERTIES)
def test_the_unbroken_one_passes(property):
    assert not failures(check_module(Plain, PlainConfig(), properties=[property]))


@pytest.mark.parametrize(("mutant", "property"), MUTANTS, ids=[f"{m.__name__}-{p}" for m, p in MUTANTS])
def test_mutant_is_caught(mutant, property):
    assert failures(check_module(mutant, mutant.config_of_test(), properties=[property]))


@pytest.mark.parametrize(
    ("mutant", "options", "property"),
    SELECTING_MUTANTS,
    ids=[f"{m.__name__}-{p}" for m, _, p in SELECTING_MUTANTS],
)
def test_selecting_mutant_is_caught(mutant, options, property):
    config = PooledTopKConfig(**{**BlockSelectionConfig.conformance_options, **options})
    assert not failures(check_module(PooledTopKAttention, config, properties=[property]))
    assert failures(check_module(mutant, config, properties=[property]))


def test_padded_queries_are_caught_by_a_gradient_under_every_pattern():
    results = failures(check_module(LeavesPaddedQueries, PlainConfig(), properties=["nan_memory"]))
    assert {r.pattern for r in results} == set(PATTERNS)
    assert all("NaN in padded queries moves the gradient of" in r.detail for r in results)


def test_an_exception_is_told_once_with_the_line_that_raised_it():
    class Raises(Plain):
        def forward(self, q, k, v, mask, **options):
            raise RuntimeError("two\nlines")

    line = Raises.forward.__code__.co_firstlineno + 1
    results = check_module(Raises, PlainConfig(), name="raises", properties=["scale", "gqa"])
    here = f"RuntimeError at test_negative_controls.py:{line}"
    assert [(r.status, r.detail) for r in results] == [
        ("fail", f"{here}: two lines"),
        *[("fail", f"{here}, as under scale, {PATTERNS[0]}")] * 7,
    ]


def test_a_write_into_an_input_is_called_that_under_every_property():
    for property in ("causality", "padding_invariance", "statistics"):
        found = failures(check_module(WritesIntoItsInput, PlainConfig(), properties=[property]))
        assert found and all("writes into its inputs: q" in r.detail for r in found)


class EveryThird(Plain):
    """A pattern, counted with the helper."""

    step = 3

    def allowed(self, q, k, mask):
        return super().allowed(q, k, mask) & self.pattern(q, k, mask, 3)

    def pattern(self, q, k, mask, step):
        return (torch.arange(q.shape[2])[:, None] + mask.query_offset - torch.arange(k.shape[2])) % step == 0

    def forward(self, q, k, v, mask, *, scale=None, context=None):
        got = super().forward(q, k, v, mask, scale=scale, context=context)
        pattern = self.pattern(q, k, mask, self.step)
        return got._replace(stats=self.some_pairs(q, k, mask, context, pattern, "plain"))


def test_the_helper_for_patterns_counts_what_moves_the_output():
    @dataclass(frozen=True)
    class Patterned(AttentionConfig):
        capabilities: ClassVar = Capabilities(patterns=PATTERNS)

    class CountsAnother(EveryThird):
        step = 2

    properties = ["density", "statistics", "batch_invariance"]
    assert not failures(check_module(EveryThird, Patterned(), properties=properties))
    assert {r.property for r in failures(check_module(CountsAnother, Patterned(), properties=properties))} == {
        "density"
    }


def test_undeclared_parameters_are_caught():
    results = check_module(Unreached, PlainConfig(), properties=["parameter_gradients"])
    assert all("owns_parameters is wrong: it has ['gain']" in r.detail for r in failures(results))
    assert failures(results)


def test_a_limited_variant_is_skipped_with_its_reasons():
    @dataclass(frozen=True)
    class Limited(AttentionConfig):
        capabilities: ClassVar = Capabilities(
            patterns=("bidirectional_self", "causal_self"),
            gqa=False,
            padding=False,
            head_dims=(8,),
            length_multiple=4,
        )

    results = check_module(Plain, Limited())
    assert not failures(results)
    assert {r.detail for r in results if r.status == "skip"} == {
        "no padding", "owns no parameters", "no decoding", "no grouped queries", "not exact at full density",
        "yields no probabilities",
    }  # fmt: skip
