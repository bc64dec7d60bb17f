"""The conformance suite over every built-in attention, and over AST's options."""

import pytest
import torch

from astbench_registry.capabilities import PATTERNS
from astbench_registry.conformance import PROPERTIES, check
from astbench_registry.conformance.cases import Subject
from astbench_registry.registry import build_attention, config_class, make_config
from astbench_registry.table import BUILTIN
from tests.registry.building import assert_conforms

AST_OPTIONS = {
    "adaptive": {"budget": "adaptive", "share": 0.1},
    "adaptive-regularised": {
        "budget": "adaptive", "share": 0.1, "lambda_density": 0.1, "lambda_entropy": 0.1, "distill_weight": 0.0
    },
    "soft": {"estimator": "soft"},
    "policy": {"estimator": "policy_gradient"},
    "sub-blocks": {"sub_blocks": 2, "patterns": 1},
    "distill-only": {"estimator": "none"},
    "straight-through-only": {"distill_weight": 0.0},
    "query-group-4": {"query_group": 4},
    "top-k": {"top_k": 3, "block_size": 3, "min_blocks": 1},
    "no-forced-first-block-wide-local-patterns": {"sink_block": False, "local_blocks": 1, "patterns": 3},
    "sampled": {"sample": True},
    "mixed-density-schedule": {
        "density_start": 0.9, "density_hold": 1, "density_steps": 4, "density_schedule": "mixed"
    },
    "coarse-tokens": {"coarse_stride": 3},
    "rest": {"rest": True},
    "rest-of-means-and-coarse-tokens": {"rest": True, "sub_blocks": 2, "coarse_stride": 3, "budget": "adaptive"},
    "density-schedule": {"density_start": 0.9, "density_steps": 2},
    "reference-backend": {"backend": "reference"},
    "carried": {"lists": "carried"},
    "index": {"index_dim": 3},
    "index-pooled": {"index_dim": 2, "index_pool": 2, "lists": "carried"},
    "index-with-patterns-and-rest": {"index_dim": 2, "patterns": 1, "rest": True},
    "carried-adaptive": {"lists": "carried", "budget": "adaptive", "share": 0.1, "block_size": 3, "sink_block": False},
    "calibrated": {"lists": "carried", "budget": "calibrated", "share": 0.1, "min_blocks": 1, "index_dim": 2},
    "carried-policy": {"lists": "carried", "estimator": "policy_gradient", "patterns": 1, "coarse_stride": 3},
}  # fmt: skip
ONLY_WHILE_TRAINING = {
    "adaptive-regularised": "adaptive",
    "policy": None,
    "distill-only": None,
    "straight-through-only": None,
    "sampled": None,
    "mixed-density-schedule": None,
    "density-schedule": None,
}
"""Of AST_OPTIONS those that change nothing but training, and the setting that each evaluates like (None: AST's own)."""
IN_EVALUATION = {
    "value_size", "padding_invariance", "batch_invariance", "gradients", "decode", "gqa", "full_density",
    "low_precision", "save_load", "scale", "statistics", "density", "cost", "explicit_weights",
    "long_causality", "long_padding",
    "long_decode", "long_full_density",
}  # fmt: skip
"""Properties that never run a module in training: what they would say of those settings they say of the others."""
CONTROL_OPTIONS = [
    ("dense", {"backend": "sdpa_math"}),
    ("dense", {"backend": "sdpa_flash"}),
    ("oracle_topk", {"query_group": 4}),
    ("oracle_topk", {"lists": "carried"}),
    ("pooled_topk", {"query_group": 4}),
    ("pooled_topk", {"lists": "carried", "query_tile": 5, "top_k": 3, "local_blocks": 1}),
    ("random_topk", {"lists": "carried"}),
    ("seer", {"lists": "carried"}),
    ("moba", {"lists": "carried", "query_tile": 6}),
    ("quest", {"lists": "carried", "query_tile": 5}),
    ("nsa", {"lists": "carried", "query_tile": 6}),
    ("local", {"window": 50}),
    ("quest", {"dense_layers": 2}),
    ("seer", {"query_group": 4}),
    ("seer", {"threshold": 0.2}),
    ("sparse", {"pattern": "strided", "stride": 6}),
    ("sparse", {"pattern": "strided", "stride": 6, "heads": "split"}),
]


@pytest.mark.parametrize("property", PROPERTIES)
@pytest.mark.parametrize("name", BUILTIN)
def test_builtin(name, property, monkeypatch):
    built, build = [], Subject.build
    monkeypatch.setattr(Subject, "build", lambda *args, **how: built.append(build(*args, **how)) or built[-1])
    assert_conforms(name, property=property)
    if name == "ast" and property in IN_EVALUATION:
        assert built and not any(module.training for module in built)


@pytest.mark.parametrize(
    ("setting", "property"),
    [(s, p) for s in AST_OPTIONS for p in PROPERTIES if not (s in ONLY_WHILE_TRAINING and p in IN_EVALUATION)],
)
def test_ast_options(setting, property):
    assert_conforms("ast", AST_OPTIONS[setting], property)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("setting", ONLY_WHILE_TRAINING)
def test_what_changes_training_alone_evaluates_bit_for_bit_like_the_others(setting, pattern):
    other = AST_OPTIONS.get(ONLY_WHILE_TRAINING[setting], {})
    found = []
    for options in (AST_OPTIONS[setting], other):
        config = make_config("ast", {**config_class("ast").conformance_options, **options})
        subject = Subject("ast", lambda config, shape: build_attention("ast", config, shape), config, pattern)
        module, case = subject.build(), subject.case(holes=0.2)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        got = case.run(module, collect_stats=True, step=1)
        grads = torch.autograd.grad(got.out.square().sum(), [*inputs, *module.parameters()], allow_unused=True)
        assert not got.losses and got.log_prob is None
        found.append([got.out, got.stats.attended, got.stats.layout.to_mask(), *grads])
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_training_would_be_seen(monkeypatch):
    """`test_builtin` holds that properties of IN_EVALUATION never train; one that does is not among them."""
    built, build = [], Subject.build
    monkeypatch.setattr(Subject, "build", lambda *args, **how: built.append(build(*args, **how)) or built[-1])
    check("ast", properties=["causality"])
    assert any(module.training for module in built) and "causality" not in IN_EVALUATION


@pytest.mark.parametrize("property", PROPERTIES)
@pytest.mark.parametrize(("name", "options"), CONTROL_OPTIONS, ids=[f"{n}-{o}" for n, o in CONTROL_OPTIONS])
def test_control_options(name, options, property):
    assert_conforms(name, options, property)


def test_results_name_variant_property_pattern_and_reason():
    results = check("oracle_topk", {"query_group": 4}, properties=["causality", "decode"])
    found = {(r.variant, r.property, r.pattern, r.status, r.detail) for r in results}
    assert found == {
        ("oracle_topk", "causality", "causal_self", "skip", "not strictly causal"),
        ("oracle_topk", "causality", "causal_cross", "skip", "not strictly causal"),
        ("oracle_topk", "decode", "causal_self", "skip", "no decoding"),
        ("oracle_topk", "decode", "causal_cross", "skip", "no decoding"),
    }


def test_every_property_says_what_must_hold():
    for name, function in PROPERTIES.items():
        assert function.__doc__.splitlines()[0].endswith("."), name


def test_unknown_property_is_an_error():
    with pytest.raises(ValueError, match="unknown property 'causalty'; there are: interface, value_size, causality"):
        check("dense", properties=["causalty"])


def test_the_suite_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check("ast", properties=["determinism"])
    assert torch.equal(torch.rand(3), expected)
