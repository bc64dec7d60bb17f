"""The conformance suite of transforms: the built-in ones pass, and each property catches a broken one."""

from dataclasses import dataclass

import pytest
import torch

from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.conformance import TRANSFORM_PROPERTIES, check_built, check_transform
from astbench_registry.transforms.interface import Transform
from astbench_registry.transforms.table import BUILTIN

OPTIONS = [
    *((name, {}) for name in BUILTIN),
    ("log3bit", {"bits": 0}),
    ("log3bit", {"threshold": 0}),
    ("log3bit", {"zeros": 0.7}),
    ("log3bit", {"zeros": 0.7, "scope": "head", "bits": 2}),
    ("hard", {"top_k": 1, "weights": "uniform"}),
    ("hard", {"weights": "raw"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{n}-{o}" for n, o in OPTIONS])
def test_builtin(name, options):
    failures = [result for result in check_transform(name, options) if result.status == "fail"]
    assert not failures


@dataclass(frozen=True)
class FewValues(TransformConfig):
    most_values = 3


@dataclass(frozen=True)
class Calibrated(TransformConfig):
    calibrated = True


class Same(Transform):
    def __call__(self, weights, visible):
        return weights.clone()

    def start(self, own, everywhere):
        pass


class OtherType(Same):
    def __call__(self, weights, visible):
        return weights.float()


class InPlace(Same):
    def __call__(self, weights, visible):
        return weights.mul_(0.5)


class Everywhere(Same):
    def __call__(self, weights, visible):
        return torch.ones_like(weights) / weights.shape[-1]


class Doubled(Same):
    def __call__(self, weights, visible):
        return 2 * weights


class Negative(Same):
    def __call__(self, weights, visible):
        return -weights


class ByAllRows(Same):
    def __call__(self, weights, visible):
        return weights * (weights >= weights.mean((2, 3), keepdim=True))


class ByAllSequences(Same):
    def __call__(self, weights, visible):
        return weights * (weights >= weights.mean((0, 3), keepdim=True))


class ByAllHeads(Same):
    def __call__(self, weights, visible):
        return weights * (weights >= weights.mean(1, keepdim=True))


class ByAllKeys(Same):
    def __call__(self, weights, visible):
        return weights * (weights >= weights.mean(-1, keepdim=True))


class Random(Same):
    def __call__(self, weights, visible):
        return weights * (torch.rand(weights.shape) < 0.5)


class Remembering(Same):
    calls = 0

    def __call__(self, weights, visible):
        self.calls += 1
        return weights / self.calls


class NextRow(Same):
    """In a whole pass each row has the weights of the one behind it, as far as they are visible."""

    def __call__(self, weights, visible):
        return torch.roll(weights, -1, 2).masked_fill(~visible, 0.0)


class Raising(Same):
    def __call__(self, weights, visible):
        raise KeyError("lost")


BROKEN = [
    (OtherType, TransformConfig, "interface", "become torch.float32"),
    (InPlace, TransformConfig, "interface", "writes into the weights"),
    (Raising, TransformConfig, "interface", "KeyError"),
    (Everywhere, TransformConfig, "hidden_pairs", "a hidden pair has weight"),
    (Doubled, TransformConfig, "between_0_and_1", "a weight of"),
    (Negative, TransformConfig, "between_0_and_1", "a weight of -"),
    (ByAllRows, TransformConfig, "rows_apart", "alone give something else"),
    (ByAllSequences, TransformConfig, "rows_apart", "alone gives something else"),
    (ByAllHeads, TransformConfig, "heads_apart", "move the first one"),
    (ByAllKeys, TransformConfig, "more_padding", "hidden keys behind"),
    (Random, TransformConfig, "determinism", "draws random numbers"),
    (Remembering, TransformConfig, "determinism", "something else after others"),
    (Same, FewValues, "declared_values", "more than the 3 values"),
    (Same, Calibrated, "calibration", "before it has seen any values"),
    (ByAllRows, TransformConfig, "in_attention", "alone gives something else"),
    (NextRow, TransformConfig, "in_attention", "moves earlier outputs"),
]


@pytest.mark.parametrize(
    ("cls", "config", "property", "detail"), BROKEN, ids=[f"{b[0].__name__}-{b[2]}" for b in BROKEN]
)
def test_a_broken_transform_is_caught(cls, config, property, detail):
    (result,) = check_built(cls, config(), properties=[property])
    assert result.status == "fail" and detail in result.detail


def test_every_property_has_a_negative_control():
    assert {property for _, _, property, _ in BROKEN} == set(TRANSFORM_PROPERTIES)


def test_what_changes_nothing_passes():
    found = {result.property: result.status for result in check_built(Same, TransformConfig())}
    assert {name for name, status in found.items() if status != "pass"} == {"declared_values", "calibration"}


def test_an_unknown_property_is_an_error():
    with pytest.raises(ValueError, match="unknown property 'hiden_pairs'; there are: interface, hidden_pairs"):
        check_transform("hard", properties=["hiden_pairs"])
