"""Names of depth policies, plugins and entry points."""

from importlib import metadata

import pytest
import torch

from astbench_registry import (
    Choice,
    DepthConfig,
    DepthPolicy,
    PluginError,
    StackShape,
    name_table,
    plugins,
    register_depth,
)
from astbench_registry.depth import registry
from astbench_registry.depth.registry import build_depth, depth_class, depth_config_class, registered_depths
from astbench_registry.errors import UnknownDepthError


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry._names, "decorated", {})


class Plain(DepthPolicy):
    def choose(self, hidden, seen):
        return Choice(torch.ones(len(hidden), self.shape.num_layers, dtype=torch.bool))


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(
        UnknownDepthError, match=r"unknown depth 'statik'; did you mean 'static'\? registered: early_ex"
    ):
        depth_config_class("statik")


def test_a_taken_name_and_wrong_kinds_are_refused():
    with pytest.raises(PluginError, match="'static' is registered twice: by astbench"):
        register_depth("static", DepthConfig)(Plain)
    with pytest.raises(PluginError, match=r"must be a subclass of astbench_registry.DepthPolicy"):
        register_depth("mine", DepthConfig)(dict)
    with pytest.raises(PluginError, match="its config must be a dataclass of DepthConfig"):
        register_depth("mine", dict)(Plain)
    with pytest.raises(PluginError, match="does not implement choose"):
        register_depth("mine", DepthConfig)(type("Idle", (DepthPolicy,), {}))


def test_an_installed_package_brings_one(monkeypatch):
    entry = metadata.EntryPoint("plain", f"{__name__}:Plain", registry.ENTRY_POINT_GROUP)
    claims = {registry.ENTRY_POINT_GROUP: {"plain": [entry]}}
    monkeypatch.setattr(plugins, "_entry_points", lambda group, path: claims.get(group, {}))
    assert registered_depths()["plain"].config is None, "listed without being loaded"

    def load(kind, ep):
        claims.clear()  # while a plugin loads, its own entry point is no clash
        return register_depth("plain", DepthConfig)(Plain)

    monkeypatch.setattr(name_table, "load_entry_point", load)
    assert depth_class("plain") is Plain


SHAPE = StackShape.of_equal_layers(4, 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("static", {"layers": 0}, r"--depth.layers must be at least 1 layer: a path of no layers is no model, got 0"),
        ("static", {"layers": 5}, r"--depth.layers must be within the model's 4 layers, 0 to 3, got 5"),
        ("static", {"path": []}, r"--depth.path must be layer numbers from 0 in ascending order, at least one"),
        ("static", {"path": [2, 1]}, r"--depth.path must be layer numbers from 0 in ascending order"),
        ("static", {"path": [1, 4]}, r"--depth.path must be within the model's 4 layers, 0 to 3"),
        ("random", {"share": 0}, r"--depth.share must be above 0"),
        ("early_exit", {"least": 0}, r"--depth.least must be at least 1 layer"),
        ("early_exit", {"least": 5}, r"--depth.least must be at most the model's 4 layers, got 5"),
        ("transformer_inverse", {"look": 0}, r"--depth.look must be at least 1 layer: a path of no layers"),
        ("transformer_inverse", {"look": 4}, r"--depth.look must be below the model's 4 layers"),
        ("transformer_inverse", {"estimator": "sampled"}, r"--depth.estimator must be one of reinforce, straight"),
        ("transformer_inverse", {"costs": 1.0}, r"has no option 'costs'; did you mean 'cost'\?"),
        ("static", {"programs": 0}, r"--depth.programs must be at least 1 program, got 0"),
        ("static", {"prompt": 0}, r"--depth.prompt must be at least 1 token, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_flag(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_depth(name, options, SHAPE)
