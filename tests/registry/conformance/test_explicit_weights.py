"""Explicit weights that the conformance suite must catch, and a transform on those that yield none."""

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, CapabilityError, build_attention
from astbench_registry.configs.dense import DenseConfig
from astbench_registry.conformance import check_module
from astbench_registry.interface import Attention, ExplicitWeights
from astbench_registry.toolbox.explicit import softmax_rows
from astbench_registry.variants.dense import DenseAttention


class Unscaled(DenseAttention):
    def explicit_weights(self, q, k, v, mask, *, scale=None, context=None):
        return super().explicit_weights(q, k, v, mask, scale=1.0, context=context)


class SeesWhatIsHidden(DenseAttention):
    def explicit_weights(self, q, k, v, mask, *, scale=None, context=None):
        open_rows = softmax_rows(q, k, AttentionMask("bidirectional_self"), scale)
        return super().explicit_weights(q, k, v, mask, scale=scale, context=context)._replace(rows=open_rows)


class OtherValues(DenseAttention):
    def explicit_weights(self, q, k, v, mask, *, scale=None, context=None):
        return super().explicit_weights(q, k, v, mask, scale=scale, context=context)._replace(values=v.flip(-1))


class CountsNothing(DenseAttention):
    def explicit_weights(self, q, k, v, mask, *, scale=None, context=None):
        return ExplicitWeights(softmax_rows(q, k, mask, scale))


class GivesNone(DenseAttention):
    explicit_weights = Attention.explicit_weights


@pytest.mark.parametrize(
    ("mutant", "detail"),
    [
        (Unscaled, "sum values to another output"),
        (SeesWhatIsHidden, "sum values to another output"),
        (OtherValues, "sum values to another output"),
        (CountsNothing, "no statistics although"),
        (GivesNone, "declares yields_probabilities and gives no weights"),
    ],
)
def test_a_mutant_is_caught(mutant, detail):
    mutant.name = "mutant"
    results = check_module(mutant, DenseConfig(), properties=["explicit_weights"])
    assert {r.status for r in results if r.pattern == "causal_self"} == {"fail"}
    assert any(detail in r.detail for r in results)


def test_an_attention_without_weights_refuses_a_transform():
    q, k, v = torch.zeros(3, 1, 2, 7, 5)
    attention = build_attention("linear", {}, AttentionShape(2, 2, 5))
    with pytest.raises(CapabilityError, match="attention 'linear' with these options yields no weights to transform"):
        attention(q, k, v, AttentionMask(), context=AttentionContext(transform=lambda weights, visible: weights))
