"""Linformer against projections written out, and against the `linformer` package."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, attention_class, build_attention
from astbench_registry.registry import make_config
from tests.oracles import BATCH, DIM, HEADS, KV_HEADS, assert_same, draw
from tests.registry.building import assert_conforms, build

K = 11
PATTERNS = ["bidirectional_self", "bidirectional_cross", "causal_cross"]
SHARINGS = ["none", "headwise", "key_value"]


def linformer(options=None, *, longest=1000, **shape):
    return build("linformer", {"k": K, **(options or {})}, longest=longest, **shape)


def written_out(q, k, v, E, F, valid, scale=None):
    """Eq. 7 one sequence and one head at a time, over the real tokens alone; heads of E and F are cycled."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        real = torch.arange(k.shape[2]) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            g = h // group
            e, f = (x[g % x.shape[0]][real] for x in (E, F))
            keys, values = e.T @ k[b, g, real], f.T @ v[b, g, real]
            weights = (q[b, h] @ keys.T * (DIM**-0.5 if scale is None else scale)).exp()
            rows.append(weights / weights.sum(-1, keepdim=True) @ values)
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 63, 127, 1000])
def test_linformer_is_the_projections_written_out(length, pattern, sharing, padding):
    keys = length if pattern.endswith("self") else max(1, length - 10)
    tensors, valid = draw(length, keys, padding=padding, grad=True)
    module = linformer({"sharing": sharing})
    mask = AttentionMask(pattern, key_valid=valid)
    got = module(*tensors, mask).out
    E = module.E
    F = E if sharing == "key_value" else module.F
    assert E.shape == (KV_HEADS if sharing == "none" else 1, 1000, K)
    expected = written_out(*tensors, E, F, valid)
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, [*tensors, *module.parameters()], rtol=1e-11)


@pytest.mark.parametrize("scale", [None, 0.37])
def test_identity_projections_are_dense_attention(scale):
    tensors, _ = draw(63)
    module = linformer({"k": 63}, longest=63)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.eye(63, dtype=torch.float64))
    dense = build_attention("dense", {}, module.shape)
    mask = AttentionMask()
    expected = dense(*tensors, mask, scale=scale).out
    torch.testing.assert_close(module(*tensors, mask, scale=scale).out, expected, rtol=0, atol=1e-13)


# ----- the package


def package_and_ours(length, *, longest=97, k=K, share_kv=False, one_kv_head=False):
    package = pytest.importorskip("linformer", reason="linformer is not installed")
    width = HEADS * DIM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = package.LinformerSelfAttention(
            width, longest, k=k, heads=HEADS, share_kv=share_kv, one_kv_head=one_kv_head
        ).double()
        x = torch.randn(BATCH, length, width, dtype=torch.float64)
    kv_heads = 1 if one_kv_head else HEADS
    ours = linformer({"k": k, "sharing": "key_value" if share_kv else "headwise"}, kv_heads=kv_heads, longest=longest)
    with torch.no_grad():
        ours.E.copy_(theirs.proj_k)
        if not share_kv:
            ours.F.copy_(theirs.proj_v)

    def heads(linear):
        return linear(x).unflatten(-1, (-1, DIM)).transpose(1, 2)

    q, k = heads(theirs.to_q), heads(theirs.to_k)
    return theirs, ours, x, (q, k, k if share_kv else heads(theirs.to_v))


@pytest.mark.parametrize("length", [97, 63, 1])
@pytest.mark.parametrize(("share_kv", "one_kv_head"), [(False, False), (True, False), (False, True)])
def test_linformer_against_the_package(length, share_kv, one_kv_head):
    theirs, ours, x, tensors = package_and_ours(length, share_kv=share_kv, one_kv_head=one_kv_head)
    out = ours(*tensors, AttentionMask()).out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(theirs.to_out(out), theirs(x), rtol=0, atol=1e-13)


def test_the_package_starts_from_the_same_range():
    theirs, ours, _, _ = package_and_ours(97)
    bound = K**-0.5
    for start in (theirs.proj_k, ours._start(1)):
        assert 0.98 * bound < float(start.detach().abs().max()) <= bound


def test_the_package_ignores_padding_masks():
    """It takes `mask` among `**kwargs` and never reads it: padding moves its rows, ours stay."""
    theirs, ours, x, tensors = package_and_ours(63)
    valid = (torch.arange(63) < 50).expand(BATCH, -1)
    noise = torch.where(valid[..., None], x, x + 1)
    moved = theirs(noise, mask=valid)[:, :50] - theirs(x, mask=valid)[:, :50]
    assert float(moved.detach().abs().max()) > 1e-3
    other = [torch.where(valid[:, None, :, None], t, t + 1) for t in tensors]
    mask = AttentionMask(key_valid=valid)
    first, second = (ours(*x, mask).out[:, :, :50] for x in (tensors, other))
    assert torch.equal(first, second)


# ----- options, cost and memory


@pytest.mark.parametrize("sharing", ["none", "key_value"])
def test_every_other_sharing_conforms(sharing):
    """That of the default, headwise, is among the conformance tests."""
    assert_conforms("linformer", {"sharing": sharing})


def test_lengths_are_refused_with_the_flag():
    with pytest.raises(ValueError, match="no longest input; set --attention"):
        linformer(longest=0)
    module = linformer({"max_length": 20})
    assert module.E.shape[1] == 20, "the option goes before the backbone's longest input"
    tensors, _ = draw(21)
    with pytest.raises(ValueError, match="20 positions, got 21 tokens; raise --attention"):
        module(*tensors, AttentionMask())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k": 0}, "--attention.k must be at least 1 row, got 0"),
        ({"sharing": "layerwise"}, "--attention.sharing must be one of none, headwise, key_value, got 'layerwise'"),
        ({"max_length": 0}, "--attention.max_length must be at least 1 token, got 0"),
    ],
)
def test_bad_values_name_the_flag(options, expected):
    with pytest.raises(ValueError) as error:
        make_config("linformer", options)
    assert str(error.value) == expected


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_flops_are_what_the_counter_sees(pattern, sharing):
    keys = 37 if pattern.endswith("self") else 53
    tensors, _ = draw(37, keys)
    mask, module = AttentionMask(pattern), linformer({"sharing": sharing})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, 37, keys, mask) == counter.get_total_flops()


def test_statistics_count_every_pair():
    tensors, valid = draw(37, padding=0.3)
    stats = linformer()(*tensors, AttentionMask(key_valid=valid), context=AttentionContext(collect_stats=True)).stats
    assert torch.equal(stats.attended, (37 * valid.sum(-1, keepdim=True)).expand(-1, HEADS).double())


def test_memory_is_linear(largest_tensor):
    length, k = 8192, 16
    shape = AttentionShape(2, 1, 4, max_positions=length)
    module = attention_class("linformer")(make_config("linformer", {"k": k}), shape)
    q, key = torch.randn(1, 2, length, 4), torch.randn(1, 1, length, 4)
    valid = (torch.arange(length) % 3 > 0)[None]
    with sdpa_kernel(SDPBackend.MATH), largest_tensor() as largest:
        module(q, key, key, AttentionMask(key_valid=valid)).out.sum().backward()
    assert length * k <= largest.elements <= 2 * length * k
