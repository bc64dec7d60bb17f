"""Names, options and plugins: what is found, and what the one-line errors say."""

import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from astbench_registry import (
    Attention,
    AttentionMask,
    AttentionShape,
    CapabilityError,
    PluginError,
    UnknownAttentionError,
    attention_class,
    build_attention,
    config_class,
    load_plugin,
    registered,
    registry,
)
from astbench_registry.capabilities import PATTERNS
from astbench_registry.configs.block_selection import PooledTopKConfig
from astbench_registry.conformance import check
from astbench_registry.registry import clashes, current_names, make_config
from astbench_registry.table import BUILTIN

SHAPE = AttentionShape(num_heads=2, num_kv_heads=1, head_dim=5, hidden_size=10, max_positions=64)

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from astbench_registry import Attention, AttentionConfig, Capabilities, register_attention


@dataclass(frozen=True)
class MineConfig(AttentionConfig):
    """Attention of mine.

    Args:
        power: Of the logits.
    """

    power: float = 2.0
    capabilities: ClassVar = Capabilities(patterns=("bidirectional_self",))


@register_attention("NAME", MineConfig)
class Mine(Attention):
    def forward(self, q, k, v, mask, *, scale=None, context=None):
        raise NotImplementedError
'''


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    """Plugins of one test are unknown to the next."""
    monkeypatch.setattr(registry._names, "decorated", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("astbench_plugin_", "fake_")):
            del sys.modules[name]


@pytest.fixture
def plugin(tmp_path):
    def write(name="mine", *, file="mine.py", code=PLUGIN, **replacements):
        code = code.replace("NAME", name)
        for old, new in replacements.items():
            assert old in code
            code = code.replace(old, new)
        path = tmp_path / file
        path.write_text(dedent(code))
        return str(path)

    return write


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A fake installed package that declares entry points."""

    def add(distribution, entries, modules):
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[astbench.attention]", *lines, ""]))
        for name, code in modules.items():
            (site / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))

    return add


def message(error):
    text = str(error.value)
    assert "\n" not in text, "an error is one line"
    return text


# ----- the table


def test_listing_and_options_need_no_torch():
    code = """
        import sys
        import astbench_registry
        from astbench_registry.registry import make_config
        for name in astbench_registry.registered():
            make_config(name, {})
        assert "torch" not in sys.modules and "numpy" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", dedent(code)], check=True)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_row_of_the_table_builds(name):
    row, found = BUILTIN[name], registered()[name]
    assert (found.source, found.config) == ("astbench", row.config)
    assert found.summary == row.config.__doc__.splitlines()[0]
    module = build_attention(name, {}, SHAPE)
    assert isinstance(module, attention_class(name)) and isinstance(module, Attention)
    assert (module.name, module.config_class, module.config) == (name, row.config, row.config())
    assert row.config.paper and set(row.config.capabilities.patterns) <= set(PATTERNS)
    assert make_config(name, module.config.as_dict()) == module.config


def test_built_ins_are_sorted_by_name():
    assert list(BUILTIN) == sorted(BUILTIN)
    assert list(registered()) == sorted(BUILTIN)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownAttentionError) as error:
        config_class("asst")
    assert message(error) == f"unknown attention 'asst'; did you mean 'ast'? registered: {', '.join(BUILTIN)}"
    with pytest.raises(UnknownAttentionError) as error:
        config_class("zzzzzz")
    assert message(error) == f"unknown attention 'zzzzzz'; registered: {', '.join(BUILTIN)}"


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(ValueError) as error:
        build_attention("ast", {"blocksize": 16}, SHAPE)
    assert "attention 'ast' has no option 'blocksize'; did you mean 'block_size'?" in message(error)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("local", {"window": 0}, "--attention.window must be at least 1 key, got 0"),
        ("ast", {"density": 0.0}, "--attention.density must be above 0 and at most 1, got 0.0"),
        ("ast", {"block_size": 0}, "--attention.block_size must be at least 1 token, got 0"),
        ("ast", {"query_group": 0}, "--attention.query_group must be at least 1 token, got 0"),
        ("ast", {"top_k": 0}, "--attention.top_k must be at least 1 block, got 0"),
        ("ast", {"min_blocks": 0}, "--attention.min_blocks must be at least 1 block, got 0"),
        ("ast", {"local_blocks": -1}, "--attention.local_blocks must be 0 or more blocks, got -1"),
        ("ast", {"share": 1.5}, "--attention.share must be above 0 and at most 1, got 1.5"),
        ("ast", {"temperature": 0.0}, "--attention.temperature must be above 0, got 0.0"),
        ("ast", {"rank": 0}, "--attention.rank must be at least 1, got 0"),
        ("ast", {"budget": "adaptve"}, "--attention.budget must be one of fixed, adaptive, calibrated, got 'adaptve'"),
        (
            "ast",
            {"estimator": "hard"},
            "--attention.estimator must be one of straight_through, soft, policy_gradient, none, got 'hard'",
        ),
        (
            "ast",
            {"density_start": 0.9},
            "--attention.density_steps must be above density_hold (0) when density_start is set, got 0",
        ),
    ],
)
def test_bad_values_name_the_flag(name, options, expected):
    with pytest.raises(ValueError) as error:
        build_attention(name, options, SHAPE)
    assert message(error) == expected


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match=r"--attention.backend must be one of auto, reference, gather, .* got 'tritn'"):
        build_attention("pooled_topk", {"backend": "tritn"}, SHAPE)
    module = build_attention("pooled_topk", PooledTopKConfig(backend="tritn"), SHAPE)
    q, k = torch.zeros(1, 2, 3, 5), torch.zeros(1, 1, 3, 5)
    with pytest.raises(ValueError, match="unknown backend 'tritn'; set backend to one of auto, reference, gather"):
        module(q, k, k, AttentionMask())


@pytest.mark.parametrize(
    ("name", "options", "layer", "reasons"),
    [
        ("performer", {"backend": "performer_pytorch"}, {"padded": True, "length": 512}, ["takes no padding"]),
        ("performer", {"backend": "performer_pytorch"}, {"padded": False, "length": 512}, []),
        ("performer", {}, {"padded": True, "length": 512}, []),
        ("linformer", {"max_length": 64}, {"length": 65}, ["takes at most 64 tokens, the length is 65"]),
        ("linformer", {"max_length": 64}, {"length": 64, "padded": True}, []),
        ("linformer", {}, {"length": 10**6}, []),
        ("synthesizer", {"max_length": 64}, {"length": 65}, ["takes at most 64 tokens, the length is 65"]),
        (
            "reformer",
            {"backend": "reformer_pytorch", "allow_duplicate_attention": True, "bucket_size": 8},
            {"padded": True, "length": 40},
            ["takes no padding", "takes multiples of 16 tokens, the length is 40"],
        ),
    ],
)
def test_options_that_limit_padding_and_lengths_are_declared(name, options, layer, reasons):
    can = make_config(name, options).can
    found = can.problems("bidirectional_self", **layer)
    assert len(found) == len(reasons) and all(text.startswith(part) for text, part in zip(found, reasons, strict=True))
    assert all(f"({can.remedy})" in text and "--attention." in can.remedy for text in found)


def test_capabilities_are_refused_with_every_reason():
    can = config_class("local").capabilities
    can.check("local", "causal_self", num_heads=6, num_kv_heads=3, head_dim=5, dtype="float32")
    with pytest.raises(CapabilityError) as error:
        can.check("local", "causal_cross", dtype="float8")
    assert message(error) == (
        "attention 'local' cannot serve this model: no causal cross attention (it has: bidirectional_self, "
        "causal_self); computes in float64, float32, bfloat16, float16, not float8"
    )


def test_grouped_selection_cannot_decode():
    config = make_config("ast", {"query_group": 4})
    assert config.capabilities.decode and not config.can.decode
    module = build_attention("ast", config, SHAPE)
    q, k = torch.zeros(1, 2, 1, 5), torch.zeros(1, 1, 6, 5)
    with pytest.raises(ValueError, match=r"set --attention\.query_group=1 to decode"):
        module(q, k, k, AttentionMask("causal_self", query_offset=5))


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("dense", {}, {}),
        ("dense", {"backend": "sdpa_math"}, {"backend": "sdpa_math"}),
        ("local", {}, {"window": 64}),
        ("ast", {"rank": 7}, {"block_size": 16, "query_group": None, "density": 0.25, "rank": 7}),
        ("ast", {"top_k": 3, "density": 0.5}, {"block_size": 16, "query_group": None, "top_k": 3}),
        (
            "ast",
            {"budget": "adaptive"},
            {"block_size": 16, "query_group": None, "min_blocks": 8, "budget": "adaptive", "share": 0.01},
        ),
        (
            "ast",
            {"budget": "adaptive", "lambda_density": 0.1},
            {"block_size": 16, "query_group": None, "density": 0.25, "min_blocks": 8, "budget": "adaptive",
             "share": 0.01, "lambda_density": 0.1},
        ),
        ("moba", {}, {"block_size": 512}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)  # fmt: skip
def test_the_head_of_a_run_shows_what_decides_where_is_attended(name, options, shown):
    headline = make_config(name, options).headline()
    assert headline == shown and list(headline) == list(shown)


# ----- loose files


def test_plugin_from_a_file(plugin):
    path = plugin()
    assert load_plugin(path) == ["mine"]
    assert load_plugin(path) == ["mine"], "naming a plugin twice is no clash"
    assert registered()["mine"].source == path
    assert registered()["mine"].summary == "Attention of mine."
    module = build_attention("mine", {"power": 3.0}, SHAPE)
    assert module.config.power == 3.0 and module.planned_backend(torch.device("cpu")) == "its own on cpu"
    with pytest.raises(ValueError, match="attention 'mine' has no option 'pover'; did you mean 'power'"):
        build_attention("mine", {"pover": 3.0}, SHAPE)
    with pytest.raises(UnknownAttentionError, match="did you mean 'mine'"):
        config_class("mime")


def test_plugin_by_its_address(plugin):
    path = plugin()
    assert build_attention(f"{path}:Mine", {}, SHAPE).name == "mine"
    with pytest.raises(PluginError) as error:
        config_class(f"{path}:Yours")
    assert message(error) == f"{path}:Yours: no class 'Yours' with @register_attention in {path}"


def test_a_plugin_that_exits_is_a_plugin_that_does_not_load(tmp_path):
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(PluginError, match=r"leaves\.py does not load: SystemExit"):
        load_plugin(str(tmp_path / "leaves.py"))


def test_plugin_by_module_name(plugin, tmp_path, monkeypatch):
    plugin(file="fake_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_plugin("fake_module") == ["mine"]
    with pytest.raises(PluginError, match="plugin no_such_module does not load: ModuleNotFoundError"):
        load_plugin("no_such_module")


def test_the_conformance_suite_runs_on_plugins(plugin):
    path = plugin()
    results = check(f"{path}:Mine", {"power": 3.0}, properties=["scale", "causality"])
    assert [(r.variant, r.property, r.status) for r in results] == [(f"{path}:Mine", "scale", "fail")]
    assert results[0].detail.startswith("NotImplementedError")


def test_missing_file(tmp_path):
    path = str(tmp_path / "nothing.py")
    with pytest.raises(PluginError) as error:
        load_plugin(path)
    assert message(error) == f"plugin file {path} does not exist"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise RuntimeError('no\\nway')", "RuntimeError: no way"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
    ],
    ids=["raises", "import", "syntax"],
)
def test_plugin_that_raises_at_import(plugin, code, expected):
    path = plugin(code=code)
    with pytest.raises(PluginError) as error:
        load_plugin(path)
    assert message(error).startswith(f"plugin {path} does not load: {expected}")
    assert list(registered()) == list(BUILTIN)


def test_plugin_that_raises_after_registering_leaves_nothing(plugin):
    path = plugin(code=PLUGIN + "\nraise RuntimeError('late')\n")
    with pytest.raises(PluginError, match="RuntimeError: late"):
        load_plugin(path)
    assert list(registered()) == list(BUILTIN)


def test_plugin_that_registers_nothing(plugin):
    path = plugin(code="x = 1")
    with pytest.raises(PluginError) as error:
        load_plugin(path)
    assert message(error) == f"plugin {path} registers no attention; decorate a class with @register_attention"


def test_names_are_taken_once(plugin):
    first, second, third = plugin(), plugin(file="second.py"), plugin("dense", file="third.py")
    load_plugin(first)
    with pytest.raises(PluginError) as error:
        load_plugin(second)
    assert message(error) == f"attention 'mine' is registered twice: by {first} and by {second}; rename one"
    assert registered()["mine"].source == first
    with pytest.raises(PluginError) as error:
        load_plugin(third)
    assert message(error) == f"attention 'dense' is registered twice: by astbench and by {third}; rename one"
    assert build_attention("dense", {}, SHAPE).name == "dense"


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        ({"class Mine(Attention)": "class Mine"}, "must be a subclass of astbench_registry.Attention"),
        ({"def forward": "def backward"}, "does not implement forward()"),
        ({"float = 2.0": "float"}, "config fields without a default: ['power']"),
        ({'Capabilities(patterns=("bidirectional_self",))': "None"}, "its config must set `capabilities"),
        ({"MineConfig(AttentionConfig)": "MineConfig"}, "its config must be a dataclass of AttentionConfig"),
        ({'"mine"': '"Mine!"'}, "use lower-case letters, digits, _ and -"),
    ],
)
def test_plugins_of_the_wrong_kind(plugin, replacements, expected):
    path = plugin(**replacements)
    with pytest.raises(PluginError) as error:
        load_plugin(path)
    assert path in message(error) and expected in message(error)
    assert list(registered()) == list(BUILTIN)


# ----- installed packages


def test_installed_plugin_is_listed_unloaded_and_built(install):
    install("fake-pack", {"mine": "fake_pack:Mine"}, {"fake_pack": PLUGIN.replace("NAME", "mine")})
    found = registered()["mine"]
    assert (found.source, found.target, found.cls, found.summary) == (
        "fake-pack", "fake_pack:Mine", None, "(not loaded)"
    )  # fmt: skip
    assert "fake_pack" not in sys.modules
    assert build_attention("mine", {"power": 4.0}, SHAPE).config.power == 4.0
    assert registered()["mine"].source == "fake-pack"
    assert registered()["mine"].summary == "Attention of mine."


def test_broken_installed_plugin_hurts_nobody_else(install):
    install("fake-good", {"good": "fake_good:Mine"}, {"fake_good": PLUGIN.replace("NAME", "good")})
    install("fake-bad", {"bad": "fake_bad:Mine"}, {"fake_bad": "raise OSError('disk\\nfull')"})
    assert {"good", "bad", "dense"} <= set(registered())
    assert build_attention("good", {}, SHAPE).name == "good"
    with pytest.raises(PluginError) as error:
        config_class("bad")
    assert message(error) == "attention 'bad' from fake-bad (fake_bad:Mine) does not load: OSError: disk full"
    assert build_attention("dense", {}, SHAPE).name == "dense"


def test_installed_plugin_that_exits_does_not_load(install):
    install("fake-exit", {"leaving": "fake_exit:Mine"}, {"fake_exit": "raise SystemExit(0)"})
    with pytest.raises(PluginError, match=r"fake-exit .* does not load: SystemExit: 0"):
        config_class("leaving")


def test_plugin_whose_init_raises_is_named(plugin):
    raising = "    def __init__(self, *_):\n        1 / 0\n\n    def forward"
    path = plugin(code=PLUGIN.replace("    def forward", raising))
    (name,) = load_plugin(path)
    with pytest.raises(PluginError, match=f"attention '{name}' from .* cannot be built: ZeroDivisionError"):
        build_attention(name, {}, SHAPE)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ast", {"density": "0.5"}, "--attention.density must be float, got '0.5'"),
        ("ast", {"block_size": 16.0}, "--attention.block_size must be int, got 16.0"),
        ("ast", {"block_size": True}, "--attention.block_size must be int, got True"),
        ("ast", {"sample": 1}, "--attention.sample must be bool, got 1"),
        ("ast", {"budget": "free"}, "--attention.budget must be one of fixed, adaptive, calibrated, got 'free'"),
        ("ast", {"top_k": 2.5}, "--attention.top_k must be int | None, got 2.5"),
    ],
)
def test_values_of_the_wrong_type_name_the_flag(name, options, expected):
    with pytest.raises(ValueError) as error:
        make_config(name, options)
    assert message(error) == expected
    assert make_config("ast", {"density": 1, "top_k": None, "min_blocks": 2}).density == 1


def test_installed_plugin_must_register_under_its_own_name(install):
    install("fake-other", {"mine": "fake_other:Mine"}, {"fake_other": PLUGIN.replace("NAME", "other")})
    with pytest.raises(PluginError) as error:
        config_class("mine")
    assert "attention 'mine' from fake-other: fake_other:Mine must carry @register_attention('mine'" in message(error)


def test_two_installed_plugins_of_one_name(install):
    install("fake-one", {"mine": "fake_one:Mine"}, {"fake_one": PLUGIN.replace("NAME", "mine")})
    install("fake-two", {"mine": "fake_two:Mine"}, {"fake_two": PLUGIN.replace("NAME", "mine")})
    assert "mine" not in registered()
    assert clashes() == {"mine": ["fake-one", "fake-two"]}
    with pytest.raises(PluginError) as error:
        config_class("mine")
    assert message(error) == "attention 'mine' is registered twice: by fake-one and by fake-two; uninstall one"


def test_installed_plugin_cannot_replace_a_built_in(install):
    install("fake-dense", {"dense": "fake_dense:Mine"}, {"fake_dense": PLUGIN.replace("NAME", "dense")})
    assert registered()["dense"].source == "astbench"
    assert clashes() == {"dense": ["astbench", "fake-dense"]}
    assert build_attention("dense", {}, SHAPE).__class__.__name__ == "DenseAttention"


def test_loose_file_against_an_installed_plugin(install, plugin):
    install("fake-pack", {"mine": "fake_pack:Mine"}, {"fake_pack": PLUGIN.replace("NAME", "mine")})
    path = plugin()
    with pytest.raises(PluginError) as error:
        load_plugin(path)
    assert message(error) == f"attention 'mine' is registered twice: by fake-pack and by {path}; rename one"


def test_a_former_name_of_an_option_is_taken():
    """Records and checkpoints of before hold it."""
    assert make_config("ast", {"first_block": False}) == make_config("ast", {"sink_block": False})
    assert make_config("ast", {"first_block": False, "sink_block": True}).sink_block
    assert current_names({"name": "ast", "first_block": False}) == {"name": "ast", "sink_block": False}
    assert current_names({"name": "gone", "first_block": False}) == {"name": "gone", "first_block": False}
    with pytest.raises(ValueError, match="no option 'last_block'"):
        make_config("ast", {"last_block": True})
