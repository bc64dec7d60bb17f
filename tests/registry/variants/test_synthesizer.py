"""Synthesizer against its logits written out token by token; no published package holds all its kinds."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.capabilities import SELF
from astbench_registry.registry import make_config
from tests import oracles
from tests.oracles import BATCH, DIM, HEADS, HIDDEN, KV_HEADS, assert_same
from tests.registry import building
from tests.registry.building import assert_conforms

build = partial(building.build, "synthesizer", longest=130, hidden=HIDDEN, weights=0.5)
draw = partial(oracles.draw, hidden=HIDDEN)
KINDS = ["dense", "random", "factorized_dense", "factorized_random"]


def network_written_out(network, head, x):
    hidden = (x @ network.W_1[head] + network.b_1[head, 0]).clamp(min=0)
    return hidden @ network.W_2[head] + network.b_2[head, 0]


def logits_written_out(module, head, i, x, length):
    """Row i of B: one number for each position."""
    kind = module.config.kind
    if kind == "dense":
        return network_written_out(module.network, head, x)[:length]
    if kind == "random":
        return module.R[head, i, :length]
    if kind == "factorized_random":
        return (module.R_1[head, i] * module.R_2[head, :length]).sum(-1)
    rows, columns = (network_written_out(n, head, x) for n in (module.rows, module.columns))
    return torch.outer(rows, columns).flatten()[:length]


def written_out(module, q, k, v, hidden, mask, scale=None):
    """One row at a time, over the keys that it sees; rows of nothing are zero."""
    scale = DIM**-0.5 if scale is None else scale
    alpha = 1 / (1 + (-module.alpha).exp()) if module.config.mix_dense else 1.0
    length, out = q.shape[2], []
    for b, h, i in ((b, h, i) for b in range(BATCH) for h in range(HEADS) for i in range(length)):
        seen = torch.arange(i + 1 if mask.causal else length)
        if mask.key_valid is not None:
            seen = seen[mask.key_valid[b, seen]]
        logits = alpha * logits_written_out(module, h, i, hidden[b, i], length)[seen] * DIM**0.5
        if module.config.mix_dense:
            logits = logits + (1 - alpha) * (k[b, h // 2, seen] @ q[b, h, i])
        weights = (logits * scale).exp()
        out.append(weights @ v[b, h // 2, seen] / weights.sum() if len(seen) else torch.zeros_like(v[b, 0, 0]))
    return torch.stack(out).view(q.shape)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "pattern"), [(1, SELF[0]), (1, SELF[1]), (31, SELF[0]), (63, SELF[1])])
def test_synthesizer_is_its_logits_written_out(length, pattern, kind, mix, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    module = build({"kind": kind, "mix_dense": mix, "k": 3})
    mask = AttentionMask(pattern, key_valid=valid)
    got = module(*tensors[:3], mask, context=AttentionContext(hidden_states=tensors[3])).out
    expected = written_out(module, *tensors, mask)
    if valid is not None:  # in padded rows the network reads zeros, not what lies there
        got, expected = (x * valid[:, None, :, None] for x in (got, expected))
    assert_same(got, expected, [*tensors, *module.parameters()], rtol=1e-11)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_another_scale_multiplies_all_logits(kind, mix):
    tensors, _ = draw(31)
    module = build({"kind": kind, "mix_dense": mix})
    context = AttentionContext(hidden_states=tensors[3])
    got = module(*tensors[:3], AttentionMask(), scale=0.9, context=context).out
    torch.testing.assert_close(got, written_out(module, *tensors, AttentionMask(), 0.9), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_conforms(kind):
    plain = [] if kind == "dense" else [{"trainable": not kind.endswith("random")}]  # the default has its own test
    for options in ({"mix_dense": True}, *plain):
        assert_conforms("synthesizer", {"kind": kind, "k": 3, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_read_only_when_mixed(kind):
    tensors, _ = draw(31)
    other = [torch.full_like(tensors[0], torch.nan), tensors[1] + 1, *tensors[2:]]
    for mix in (False, True):
        module = build({"kind": kind, "mix_dense": mix})
        first, second = (
            module(*x[:3], AttentionMask(), context=AttentionContext(hidden_states=x[3])).out for x in (tensors, other)
        )
        assert torch.equal(first, second) != mix


def test_factors_cover_every_position_with_its_own_product():
    for longest in (1, 2, 16, 97, 130):
        module = build({"kind": "factorized_dense"}, longest=longest)
        a, b = module.rows.size, module.columns.size
        assert longest <= a * b <= longest + b and abs(a - b) <= 2
    tensors, _ = draw(100)
    logits = module._synthesized(*tensors[:2], AttentionMask(), AttentionContext(hidden_states=tensors[3]))
    assert all(len(row.unique()) == 100 for row in logits.detach().flatten(0, 2))


@pytest.mark.parametrize("kind", ["random", "factorized_random"])
def test_fixed_logits_depend_on_seed_and_layer_alone(kind):
    def fixed(**options):
        state = build({"kind": kind, "trainable": False, "seed": options.get("seed", 0)}, layer=options.get("layer", 0))
        return next(iter(state.buffers()))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fixed()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, fixed())
    assert not torch.equal(first, fixed(seed=1)) and not torch.equal(first, fixed(layer=1))
    assert not list(build({"kind": kind, "trainable": False}).parameters())


def test_the_starts():
    """Glorot bounds, zero biases, unit normals, and an even mixture."""
    assert float(build({"kind": "random"}, weights=None).R.detach().abs().max()) <= (3 / 130) ** 0.5
    assert abs(float(build({"kind": "factorized_random"}, weights=None).R_1.detach().std()) - 1) < 0.05
    module = build({"mix_dense": True}, weights=None)
    assert not module.network.b_1.any() and not module.network.b_2.any()
    assert float(module.alpha.detach().sigmoid()) == 0.5
    assert 0.95 < float(module.network.W_1.detach().abs().max()) / (6 / (HIDDEN + DIM)) ** 0.5 <= 1


# ----- options and cost


def test_capabilities_follow_the_options():
    can = {kind: make_config("synthesizer", {"kind": kind}).can for kind in KINDS}
    assert {kind: c.needs_hidden_states for kind, c in can.items()} == {
        "dense": True, "random": False, "factorized_dense": True, "factorized_random": False
    }  # fmt: skip
    fixed = make_config("synthesizer", {"kind": "random", "trainable": False})
    assert can["random"].owns_parameters and not fixed.can.owns_parameters
    assert replace(fixed, mix_dense=True).can.owns_parameters


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="no longest input; set --attention"):
        build(longest=0)
    with pytest.raises(ValueError, match="needs AttentionShape"):
        build(hidden=0)
    tensors, _ = draw(31)
    with pytest.raises(ValueError, match="of kind dense needs the layer's hidden states"):
        build()(*tensors[:3], AttentionMask())
    with pytest.raises(ValueError, match="30 positions, got 31 tokens; raise --attention"):
        build({"max_length": 30})(*tensors[:3], AttentionMask())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"kind": "fixed"},
            "--attention.kind must be one of dense, random, factorized_dense, factorized_random, got 'fixed'",
        ),
        ({"trainable": False}, "--attention.trainable must be true for kind dense, got False"),
        ({"k": 0}, "--attention.k must be at least 1, got 0"),
        ({"max_length": 0}, "--attention.max_length must be at least 1 token, got 0"),
    ],
)
def test_bad_values_name_the_flag(options, expected):
    with pytest.raises(ValueError) as error:
        make_config("synthesizer", options)
    assert str(error.value) == expected


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_what_the_counter_sees(kind, mix):
    tensors, _ = draw(37)
    mask, module = AttentionMask(), build({"kind": kind, "mix_dense": mix, "k": 3})
    with FlopCounterMode(display=False) as counter:
        module(*tensors[:3], mask, context=AttentionContext(hidden_states=tensors[3]))
    product = 2 * HEADS * 37 * 37 * 3 if kind == "factorized_random" else 0  # R_1 R_2^T, whatever the batch
    assert module.flops(BATCH, 37, 37, mask) + product == counter.get_total_flops()


def test_the_state_is_the_values():
    assert build().state_size(10) == KV_HEADS * 10 * DIM
    assert build({"mix_dense": True}).state_size(10) == 2 * KV_HEADS * 10 * DIM
