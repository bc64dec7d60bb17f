"""The conformance suite of depth policies: the built-in ones pass, and each property catches a broken one."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from astbench.backbones.depth.conformance import DEPTH_PROPERTIES, Subject, check_depth, check_subject
from astbench.backbones.depth.folding import Folding
from astbench_registry import Choice, DepthConfig, DepthPolicy
from astbench_registry.depth.table import BUILTIN

OPTIONS = [
    *((name, {}) for name in BUILTIN),
    ("static", {"path": [0, 2, 3]}),
    ("transformer_inverse", {"choose": "number", "look": 2}),
    ("transformer_inverse", {"estimator": "straight_through", "distill": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{n}-{o}" for n, o in OPTIONS])
def test_builtin(name, options):
    failures = [result for result in check_depth(name, options) if result.status == "fail"]
    assert not failures


@pytest.mark.parametrize("attention", ["ast", "linear", "local", "moba", "nsa", "performer", "sqa"])
def test_under_other_attentions(attention):
    """Depth knows nothing of the attention: what holds of both (exactness batched and alone) has to hold still."""
    properties = ["full_depth", "paths", "folded", "one_by_one"]
    results = check_depth("random", properties=properties, attention=attention)
    assert not [result for result in results if result.status == "fail"]


@dataclass(frozen=True)
class Learns(DepthConfig):
    learns = True


class ByContent(DepthPolicy):
    """The first two layers, and the others by the signs of an input's first numbers."""

    def choose(self, hidden, seen):
        paths = torch.ones(len(hidden), self.shape.num_layers, dtype=torch.bool)
        paths[:, 2:] = hidden.masked_fill(~seen[..., None], 0).sum(1)[:, :2] > 0
        return Choice(paths)


class NoTensor(ByContent):
    def choose(self, hidden, seen):
        return super().choose(hidden, seen).paths


class Floats(ByContent):
    def choose(self, hidden, seen):
        return Choice(super().choose(hidden, seen).paths.float())


class InPlace(ByContent):
    def choose(self, hidden, seen):
        hidden.mul_(2)
        return super().choose(hidden, seen)


class Empty(ByContent):
    def choose(self, hidden, seen):
        return Choice(torch.zeros(len(hidden), self.shape.num_layers, dtype=torch.bool))


class ByAllInputs(ByContent):
    def choose(self, hidden, seen):
        return super().choose(hidden + 0.3 * hidden.mean(0, keepdim=True) * len(hidden), seen)


class ByLength(ByContent):
    def choose(self, hidden, seen):
        paths = torch.ones(len(hidden), self.shape.num_layers, dtype=torch.bool)
        paths[:, 2:] = hidden.shape[1] % 2 == 0
        return Choice(paths)


class Drawn(ByContent):
    def choose(self, hidden, seen):
        paths = super().choose(hidden, seen).paths
        paths[:, 2:] = torch.rand(paths[:, 2:].shape) > 0.5
        return Choice(paths)


class Remembering(ByContent):
    calls = 0

    def choose(self, hidden, seen):
        self.calls += 1
        paths = torch.ones(len(hidden), self.shape.num_layers, dtype=torch.bool)
        paths[:, 2:] = self.calls % 3 == 0
        return Choice(paths)


class ByTheEnd(ByContent):
    def choose(self, hidden, seen):
        return super().choose(hidden, torch.ones_like(seen))


class Deaf(ByContent):
    """Has parameters that nothing reaches."""

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.unused = nn.Linear(2, 1)


class AddsALittle(Folding):
    def _run(self, hidden, calls):
        return super()._run(hidden, calls) + 1e-9


class Masks(Folding):
    """Runs all layers for all inputs and takes back what was not asked for."""

    def _grouped(self, hidden, calls, ran, gates, first):
        rows = torch.arange(len(hidden))
        for layer in range(first, len(self.stack.layers)):
            out = self._through((layer,), hidden, calls, rows, None)
            hidden = torch.where(ran[:, layer, None, None], out, hidden)
        return hidden


class Skewed(Folding):
    """Hands the groups' outputs back in the order of the groups."""

    def _grouped(self, hidden, calls, ran, gates, first):
        out = super()._grouped(hidden, calls, ran, gates, first)
        return out[ran.int().sum(-1).argsort(stable=True)]


class AsksAnew(Folding):
    def _kept(self, cache, batch):
        return Choice(torch.ones(batch, len(self.stack.layers), dtype=torch.bool))


CONTROLS = [
    ("interface", NoTensor, DepthConfig, Folding, "not a Choice"),
    ("interface", Floats, DepthConfig, Folding, "paths are torch.float32"),
    ("interface", InPlace, DepthConfig, Folding, "writes into the hidden states"),
    ("full_depth", ByContent, DepthConfig, AddsALittle, "something else than the plain model"),
    ("paths", ByContent, DepthConfig, Skewed, "differs from a model of these layers"),
    ("folded", ByContent, DepthConfig, Masks, "layers ran for"),
    ("no_empty_path", Empty, DepthConfig, Folding, "depth 'empty' chose a path of no layers for input 0"),
    ("one_by_one", ByAllInputs, DepthConfig, Folding, "alone takes another path"),
    ("padding", ByLength, DepthConfig, Folding, "padding behind moves a path"),
    ("determinism", Drawn, DepthConfig, Folding, "draws random numbers"),
    ("determinism", Remembering, DepthConfig, Folding, "take another path after others"),
    ("causality", ByTheEnd, DepthConfig, Folding, "tokens from 16 on move a path"),
    ("gradients", ByContent, Learns, Folding, "declares learns=True, has 0 tensors"),
    ("gradients", Deaf, DepthConfig, Folding, "declares learns=False, has 2 tensors"),
    ("gradients", Deaf, Learns, Folding, "no finite gradient reaches unused.weight"),
    ("decoding", ByContent, DepthConfig, AsksAnew, "goes another way than the prompt"),
]


@pytest.mark.parametrize(
    ("wanted", "policy", "config", "folding", "detail"), CONTROLS, ids=[f"{c[0]}-{c[1].__name__}" for c in CONTROLS]
)
def test_each_property_catches_what_breaks_it(wanted, policy, config, folding, detail):
    policy.name = policy.__name__.lower()
    (result,) = check_subject(Subject(policy, config(), folding), properties=[wanted])
    assert result.status == "fail" and detail in result.detail, result.detail


def test_a_good_policy_of_ones_own_passes_and_every_property_has_a_control():
    ByContent.name = "by_content"
    results = check_subject(Subject(ByContent, DepthConfig()))
    assert {r.property: r.detail for r in results if r.status == "fail"} == {}
    assert {control[0] for control in CONTROLS} == set(DEPTH_PROPERTIES)


def test_unknown_properties_are_named():
    with pytest.raises(ValueError, match="unknown property 'foldd'; there are: interface"):
        check_depth("static", properties=["foldd"])
