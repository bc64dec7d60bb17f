"""Linear attention, and the prefix sums it shares with the Performer, against the definition written out."""

import pytest
import torch
from torch.nn.functional import elu
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionMask, AttentionShape, build_attention
from astbench_registry.toolbox.linear import CHUNK, normalised_linear_attention
from tests.oracles import BATCH, DIM, HEADS, KV_HEADS, PATTERNS, assert_same, draw, normalised, visible
from tests.registry.building import build


def weighted(weights, v, pattern, valid):
    """Average of the values with the visible weights; rows that see nothing are zero."""
    weights = torch.where(visible(*weights.shape[2:], pattern, valid), weights, 0.0)
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    return torch.einsum("bhij,bhjd->bhid", normalised(weights), v)


def oracle(q, k, v, pattern, valid):
    """Equation 5 with all N x M weights."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return weighted(torch.einsum("bhid,bhjd->bhij", elu(q) + 1, elu(k) + 1), v, pattern, valid)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 127, 1000])
def test_is_the_definition(length, pattern, padding):
    tensors, valid = draw(length, length if pattern.endswith("self") else 73, padding=padding, grad=True)
    mask = AttentionMask(pattern, key_valid=valid)
    got, expected = build("linear", train=False)(*tensors, mask).out, oracle(*tensors, pattern, valid)
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors)


def test_causal_form_is_the_recurrence():
    """Equations 16 to 20: one token at a time, from a state of d x d and d."""
    (q, k, v), _ = draw(131)
    q = q[:, :KV_HEADS]
    state, norm, rows = torch.zeros(BATCH, KV_HEADS, DIM, DIM, dtype=q.dtype), torch.zeros_like(q[:, :, 0]), []
    for i in range(131):
        feature, query = elu(k[:, :, i]) + 1, elu(q[:, :, i]) + 1
        state = state + feature[..., :, None] * v[:, :, i, None, :]
        norm = norm + feature
        rows.append((query[..., None, :] @ state).squeeze(-2) / (query * norm).sum(-1, keepdim=True))
    module = build_attention("linear", {}, AttentionShape(KV_HEADS, KV_HEADS, DIM))
    got = module(q, k, v, AttentionMask("causal_self")).out
    torch.testing.assert_close(got, torch.stack(rows, 2), rtol=0, atol=1e-12)
    assert module.state_size(1) == module.state_size(131) == state[0].numel() + norm[0].numel()


def test_scale_is_relative_to_the_papers():
    (q, k, v), _ = draw(37)
    mask = AttentionMask("bidirectional_self")
    got = build("linear", train=False)(q, k, v, mask, scale=0.3).out
    torch.testing.assert_close(got, oracle(q * 0.3 * DIM**0.5, k, v, mask.pattern, None), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:distutils:DeprecationWarning", "ignore:.*distutils.*:UserWarning")
@pytest.mark.parametrize("causal", [True, False])
def test_against_the_sums_of_the_performer_package(causal):
    package = pytest.importorskip("performer_pytorch", reason="performer-pytorch is not installed").performer_pytorch
    (q, k, v), _ = draw(300)
    k_all, v_all = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    features = elu(q) + 1, elu(k_all) + 1, v_all
    expected = (
        package.causal_linear_attention_noncuda(*features, eps=0.0) if causal else package.linear_attention(*features)
    )
    got = build("linear", train=False)(q, k, v, AttentionMask("causal_self" if causal else "bidirectional_self")).out
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("pattern", "offset"), [*((pattern, 0) for pattern in PATTERNS), ("causal_self", 90)])
def test_flops_are_what_the_counter_sees(pattern, offset):
    keys = 191 if pattern.endswith("self") else 53
    (q, k, v), _ = draw(191, keys)
    mask, module = AttentionMask(pattern, query_offset=offset), build("linear", train=False)
    with FlopCounterMode(display=False) as counter:
        module(q[:, :, offset:], k, v, mask)
    assert module.flops(BATCH, 191 - offset, keys, mask) == counter.get_total_flops()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_tensor_grows_with_the_square_of_the_length(pattern, largest_tensor):
    found = []
    for length in (4096, 8192):
        tensors = [torch.randn(1, h, length, 8, requires_grad=True) for h in (2, 1, 1)]
        module = build_attention("linear", {}, AttentionShape(2, 1, 8))
        with largest_tensor() as largest:
            module(*tensors, AttentionMask(pattern)).out.sum().backward()
        found.append(largest.elements)
    assert found[1] <= 2 * found[0] <= 2 * 2 * 4096 * CHUNK


@pytest.mark.parametrize("pattern", PATTERNS[:2])
@pytest.mark.parametrize("spread", [0.0, 100.0, 1e4])
def test_keys_of_any_log_scale(pattern, spread):
    """float32, where exp(s) itself is far out of range; the result is the definition's in logarithms."""
    g = torch.Generator().manual_seed(0)
    q, k, v, s = (torch.rand(1, 2, 200, width, generator=g) for width in (7, 7, 3, 1))
    s = ((s - 0.5) * spread).squeeze(-1)
    valid = torch.rand(1, 200, generator=g) > 0.3
    mask = AttentionMask(pattern, key_valid=valid)
    marked = [torch.cat(x, -1) for x in ((q, torch.zeros(1, 2, 200, 1)), (k, s.unsqueeze(-1)))]
    got = normalised_linear_attention(*marked, v, mask, lambda x: (x[..., :-1], x[..., -1]), 7)
    allowed = mask.dense(200, 200, q.device).expand(1, 2, 200, 200)
    logits = (q.double() @ k.double().mT).log() + s.double()[:, :, None]
    logits = logits.masked_fill(~allowed, -torch.inf)
    expected = logits.softmax(-1).nan_to_num(0.0) @ v.double()
    got, expected = mask.real_queries(got.double()), mask.real_queries(expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_far_negative_inputs_keep_their_precision():
    """elu(x) + 1 in float32 is 0 from x = -17.4 down; the features here are exp(x)."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 8, generator=g) for _ in range(3))
    q, k = q - 22, k - 22
    module, mask = build_attention("linear", {}, AttentionShape(2, 2, 8)), AttentionMask("causal_self")
    expected = weighted(q.double().exp() @ k.double().exp().mT, v.double(), "causal_self", None)
    torch.testing.assert_close(module(q, k, v, mask).out.double(), expected, rtol=0, atol=1e-5)
    assert not (elu(q) + 1).any()
