"""Names of transforms, plugins and entry points; values on a log axis."""

from importlib import metadata

import pytest
import torch

from astbench_registry import PluginError, Transform, TransformConfig, name_table, plugins, register_transform
from astbench_registry.errors import CapabilityError, UnknownTransformError
from astbench_registry.transforms import registry
from astbench_registry.transforms.applied import AppliedTransform, different_values
from astbench_registry.transforms.registry import (
    registered_transforms,
    require_probabilities,
    transform_class,
    transform_config_class,
)
from astbench_registry.transforms.values import ValueCounts


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry._names, "decorated", {})


class Plain(Transform):
    def __call__(self, weights, visible):
        return weights


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UnknownTransformError, match="unknown transform 'log3bits'; did you mean 'log3bit'"):
        transform_config_class("log3bits")


def test_a_taken_name_and_wrong_kinds_are_refused():
    with pytest.raises(PluginError, match="'hard' is registered twice: by astbench"):
        register_transform("hard", TransformConfig)(Plain)
    with pytest.raises(PluginError, match="must be a subclass of astbench_registry"):
        register_transform("mine", TransformConfig)(dict)
    with pytest.raises(PluginError, match="its config must be a dataclass of TransformConfig"):
        register_transform("mine", dict)(Plain)
    with pytest.raises(PluginError, match="does not implement __call__"):
        register_transform("mine", TransformConfig)(type("Idle", (Transform,), {}))


def test_an_installed_package_brings_one(monkeypatch):
    entry = metadata.EntryPoint("plain", f"{__name__}:Plain", registry.ENTRY_POINT_GROUP)
    claims = {registry.ENTRY_POINT_GROUP: {"plain": [entry]}}
    monkeypatch.setattr(plugins, "_entry_points", lambda group, path: claims.get(group, {}))
    assert registered_transforms()["plain"].config is None, "listed without being loaded"

    def load(kind, ep):
        claims.clear()  # while a plugin loads, its own entry point is no clash
        return register_transform("plain", TransformConfig)(Plain)

    monkeypatch.setattr(name_table, "load_entry_point", load)
    assert transform_class("plain") is Plain


def test_who_yields_no_probabilities_is_told_who_does():
    require_probabilities("dense", able=True, what="--transform=hard")
    with pytest.raises(CapabilityError, match=r"'linear' does not yield; these do: ast, bigbird, dense, local"):
        require_probabilities("linear", able=False, what="--transform=hard")


def test_shares_below_powers_of_ten_are_exact():
    counts = ValueCounts(1)
    values = torch.tensor([0, 1e-13, 1e-9, 0.9e-3, 1e-3, 2e-3, 0.5, 1.0], dtype=torch.float64)[None, None, None]
    visible = torch.ones_like(values, dtype=torch.bool)
    visible[..., 0] = False
    counts.add(values.masked_fill(~visible, 0.0), visible)
    assert counts.total.tolist() == [7]
    for limit, below in ((1e-12, 1), (1e-9, 1), (1e-8, 2), (1e-3, 3), (1e-2, 5), (0.9, 6)):
        assert counts.share_below(limit).item() == pytest.approx(below / 7), limit


def test_different_values_are_counted_until_there_are_too_many():
    few = torch.tensor([0.0, 0.5, 0.5, 0.25]).repeat(100)
    assert different_values(few, 3) == {0.0, 0.25, 0.5}
    assert different_values(few[few > 0], 3) == {0.25, 0.5}
    assert different_values(torch.arange(1, 9) / 8, 7) is None
    assert different_values(torch.cat([torch.ones(99), torch.arange(9) / 9]), 3) is None


def test_what_a_layer_was_left_is_counted_by_head():
    applied = AppliedTransform(None, 2)
    weights = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]])[None]
    visible = torch.tensor([[True, True, False], [True, True, True]])[None, None]
    applied(weights, visible)
    applied.counting = True
    applied(weights, visible)
    found = applied.counted
    assert found.zeros == pytest.approx([2 / 5, 1 / 5]) and found.row_sums == pytest.approx([0.625, 1.0])
    assert found.values == {0.0, 0.25, 0.5, 1.0}
    assert (found + found).zeros == found.zeros and (found + found).visible == 10


def test_a_transform_of_another_shape_is_refused():
    applied = AppliedTransform(
        type("Cut", (Plain,), {"name": "cut", "__call__": lambda s, w, v: w[..., 1:]})(None, None), 2
    )
    with pytest.raises(CapabilityError, match=r"transform 'cut' must return weights \(1, 2, 3, 4\)"):
        applied(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4, dtype=torch.bool))


@pytest.mark.parametrize("leak", [0.1, -0.1, torch.nan])
def test_a_transform_that_looks_ahead_is_refused_where_it_runs(leak):
    """`check` finds it too, but a run would score what the model must not see."""

    def leaking(self, weights, visible):
        return weights.masked_fill(~visible, leak)

    applied = AppliedTransform(type("Leak", (Plain,), {"name": "leak", "__call__": leaking})(None, None), 2)
    visible = torch.ones(3, 4, dtype=torch.bool).tril()[None, None]
    with pytest.raises(CapabilityError, match="transform 'leak' gives weight to pairs that the mask hides"):
        applied(torch.zeros(1, 2, 3, 4), visible)
    applied(torch.zeros(1, 2, 3, 4), torch.ones_like(visible))
