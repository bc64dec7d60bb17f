"""Longformer against a mask written out in float64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.conformance import PROPERTIES
from astbench_registry.registry import make_config
from tests.oracles import BATCH, DIM, HEADS, HIDDEN, KV_HEADS, PATTERNS, assert_same, draw, softmax_attention
from tests.registry.building import assert_conforms, build

LONG = pytest.param(1000, 0.3, marks=pytest.mark.slow)
OPTIONS = {
    "plain": {"window": 5},
    "dilated": {"window": 3, "dilation": 4, "num_global": 3},
    "two-dilated": {"window": 3, "dilation": 3, "dilated_heads": 2, "num_global": 0},
    "projected": {"window": 5, "num_global": 2, "global_projections": True},
    "transformers": {"window": 5, "num_global": 2, "backend": "transformers"},
}


def longformer(options, **shape):
    kv_heads = KV_HEADS if make_config("longformer", options).can.gqa else HEADS
    return build("longformer", options, kv_heads=kv_heads, hidden=HIDDEN, weights=0.5, **shape)


def skip_without(module, pattern):
    if pattern not in module.config.can.patterns:
        pytest.skip(f"this backend has no {pattern} attention")


def draw_named(length, *, padding=0.0, **sizes):
    """q, k, v, hidden states (all with gradients), a padding mask and a few tokens that the task names."""
    g = torch.Generator().manual_seed(0)
    tensors, valid = draw(length, hidden=HIDDEN, padding=padding, seed=g, grad=True, **sizes)
    named = torch.rand(BATCH, length, generator=g) < 5 / length
    named[1] &= torch.rand(length, generator=g) < 0.3  # another number in each sequence
    return tensors, valid, named


def global_tokens(length, options, valid, named):
    """Bool `(batch, length)`, token by token."""
    chosen = torch.zeros(BATCH, length, dtype=torch.bool)
    for b in range(BATCH):
        left = options.get("num_global", 1)
        for i in range(length):
            real = valid is None or bool(valid[b, i])
            if real and (left > 0 or (named is not None and bool(named[b, i]))):
                chosen[b, i] = True
            left -= real
    return chosen


def pattern_mask(length, options, pattern, valid, chosen):
    """Bool `(batch, heads, length, length)`: who sees whom, after section 3.1."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    dilation = options.get("dilation", 1)
    heads = torch.arange(HEADS) < options.get("dilated_heads", HEADS)
    step = torch.where(heads, dilation, 1)[:, None, None]
    window = ((i - j).abs() <= options["window"] * step) & ((i - j) % step == 0)
    allowed = window | chosen[:, None, None, :] | chosen[:, None, :, None]
    if pattern == "causal_self":
        allowed = allowed & (j <= i)
    return allowed if valid is None else allowed & valid[:, None, None, :]


def oracle(module, tensors, options, pattern, valid, named, scale):
    q, k, v, hidden = tensors
    chosen = global_tokens(q.shape[2], options, valid, named)
    allowed = pattern_mask(q.shape[2], options, pattern, valid, chosen)
    out = softmax_attention(q, k, v, allowed, scale)
    if options.get("global_projections"):
        linears = (module.query_global, module.key_global, module.value_global)
        own = [
            (hidden @ x.weight.T + (0 if x.bias is None else x.bias)).view(BATCH, -1, HEADS, DIM).transpose(1, 2)
            for x in linears
        ]
        out = torch.where(chosen[:, None, :, None], softmax_attention(*own, allowed, scale), out)
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("length", "padding"), [(1, 0.0), (63, 0.0), (63, 0.3), (127, 0.0), (127, 0.3), (500, 0.3), LONG]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_a_masked_softmax(options, length, pattern, padding):
    module = longformer(options)
    skip_without(module, pattern)
    tensors, valid, named = draw_named(length, padding=padding, kv_heads=module.shape.num_kv_heads)
    context = AttentionContext(hidden_states=tensors[3], global_tokens=named)
    mask = AttentionMask(pattern, key_valid=valid)
    got = module(*tensors[:3], mask, scale=0.4, context=context).out
    expected = oracle(module, tensors, options, pattern, valid, named, 0.4)
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(
        got, expected, [*tensors[: 4 if module.config.global_projections else 3], *module.parameters()], gradients=1e-10
    )


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "projected"])
def test_pattern_is_exact(name, pattern, padding):
    """Values are the identity, so that output > 0 is the pattern; the statistics count it."""
    size, options = 61, OPTIONS[name]
    module = longformer(options, dim=size)
    skip_without(module, pattern)
    (q, k, _, _), valid, named = draw_named(size, dim=size, padding=padding, kv_heads=module.shape.num_kv_heads)
    eye = torch.eye(size, dtype=torch.float64).expand_as(k)
    context = AttentionContext(collect_stats=True, global_tokens=named)
    out = module(q, k, eye, AttentionMask(pattern, key_valid=valid), context=context)
    expected = pattern_mask(size, options, pattern, valid, global_tokens(size, options, valid, named))
    expected = expected.expand(BATCH, HEADS, size, size)
    assert torch.equal(out.out > 0, expected)
    assert torch.equal(out.stats.attended, expected.sum((-1, -2)).double())


@pytest.mark.parametrize("property", PROPERTIES)
@pytest.mark.parametrize("options", list(OPTIONS.values())[1:], ids=list(OPTIONS)[1:])
def test_options_conform(options, property):
    assert_conforms("longformer", options, property)


def test_named_tokens_move_only_their_own_sequence():
    """The gathered lists are as long as the batch's longest; a sequence alone gives the same."""
    module = longformer({"window": 4})
    (q, k, v, _), _, named = draw_named(77)
    named[0, 5:25] = True
    mask = AttentionMask("bidirectional_self")
    together = module(q, k, v, mask, context=AttentionContext(global_tokens=named)).out
    for b in range(BATCH):
        rows = slice(b, b + 1)
        alone = module(q[rows], k[rows], v[rows], mask, context=AttentionContext(global_tokens=named[rows])).out
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-12)


def test_tokens_named_in_the_prompt_stay_global_while_decoding():
    module, length = longformer({"window": 4}), 41
    (q, k, v, _), _, named = draw_named(length)
    named[:, 20:] = False
    context = AttentionContext(global_tokens=named[:, :20])
    whole = module(q, k, v, AttentionMask("causal_self"), context=context).out
    for i in range(20, length):
        mask = AttentionMask("causal_self", query_offset=i)
        step = module(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], mask, context=context).out
        torch.testing.assert_close(step, whole[:, :, i : i + 1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"global_tokens must be \(2, 10 or fewer\), got \(2, 20\)"):
        module(q[:, :, :10], k[:, :, :10], v[:, :, :10], AttentionMask("causal_self"), context=context)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flops_are_what_the_counter_sees(options, pattern):
    module, length = longformer(options), 101
    skip_without(module, pattern)
    tensors, _, _ = draw_named(length, kv_heads=module.shape.num_kv_heads)
    mask, context = AttentionMask(pattern), AttentionContext(hidden_states=tensors[3])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*tensors[:3], mask, context=context)
    assert module.flops(BATCH, length, length, mask) == counter.get_total_flops()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{"window": 32}, {"window": 32, "dilation": 4}], ids=["plain", "dilated"])
def test_memory_is_linear_in_the_length(options, pattern, largest_tensor):
    found = []
    for length in (4096, 8192):
        module = build_attention("longformer", options, AttentionShape(1, 1, 4))
        q, k, v = torch.randn(3, 1, 1, length, 4, generator=torch.Generator().manual_seed(0)).unbind()
        named = torch.arange(length)[None] % (length // 8) == 0
        context = AttentionContext(global_tokens=named)
        with largest_tensor() as largest, torch.no_grad():
            module(q, k, v, AttentionMask(pattern), context=context)
        found.append(largest.elements)
    assert found[1] <= 2 * found[0] * 1.05 and found[1] < 8192 * 256


def test_bad_options_name_their_flags():
    shape = AttentionShape(6, 3, 5)
    for options, flag in (
        ({"window": 0}, "--attention.window"),
        ({"dilation": 0}, "--attention.dilation"),
        ({"dilation": 2, "dilated_heads": 3}, "--attention.dilated_heads must be at most 6 and a multiple of the 2"),
        ({"dilation": 2, "dilated_heads": 8}, "--attention.dilated_heads must be at most 6"),
        ({"num_global": 0, "global_projections": True}, "--attention.num_global"),
        ({"dilation": 2, "backend": "transformers"}, "--attention.dilation"),
        ({"window": 1, "backend": "transformers"}, "--attention.window"),
    ):
        with pytest.raises(ValueError, match=flag):
            build_attention("longformer", options, shape)
