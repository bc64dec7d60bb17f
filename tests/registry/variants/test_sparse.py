"""Sparse Transformer attention against the published masks, written out from their definition."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from tests import oracles
from tests.oracles import BATCH, DIM, HEADS, SELF, assert_same, softmax_attention
from tests.registry import building

build = partial(building.build, "sparse")
draw = partial(oracles.draw, seed=None)
STRIDED = [{"pattern": "strided", "stride": s, "heads": h} for s in (1, 7, 16) for h in ("merged", "split")]
FIXED = [
    {"stride": 12, "block_size": 3, "num_verts": 1},
    {"stride": 16, "block_size": 2, "num_verts": 4, "vertsize": 2},
    {"stride": 12, "block_size": 4, "num_verts": 3},
    {"stride": 5, "block_size": 1, "num_verts": 1, "vertsize": 2},
]


def attn_mask(n, mode, ctx):
    """`get_attn_mask` of openai/sparse_attention, pair by pair; "local" and "strided" only look back."""
    rule = {
        "all": lambda q, k: k <= q,
        "local": lambda q, k: k <= q and q - k <= min(n - 1, ctx - 1),
        "strided": lambda q, k: k <= q and (q - k) % ctx == 0,
    }[mode]
    return torch.tensor([[rule(q, k) for k in range(n)] for q in range(n)])


def fixed_mask(n, options, head):
    """The blocks of `get_blocksparse_obj(attn_mode="fixed")` for one head, and its causal diagonal, in tokens."""
    size, vertsize = options["block_size"], options.get("vertsize", 1)
    window, blocks = options["stride"] // size, -(-n // size)
    # range(window - 1, -1, -1) cut into runs of `vertsize`; head h takes run h modulo num_verts.
    which = head % options["num_verts"]
    chosen = list(range(window - 1, -1, -1))[which * vertsize : (which + 1) * vertsize]
    layout = torch.zeros(blocks, blocks, dtype=torch.bool)
    for q, k in itertools.product(range(blocks), range(blocks)):
        layout[q, k] = k % window in chosen or q // window == k // window
    return layout.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :n]


def expected_mask(n, options, pattern, layer=0):
    """Bool `(heads, n, n)`."""
    if options.get("pattern") != "strided":
        masks = torch.stack([fixed_mask(n, options, head) for head in range(HEADS)])
        return masks & attn_mask(n, "all", None) if pattern == "causal_self" else masks
    local, strided = (attn_mask(n, mode, options["stride"]) for mode in ("local", "strided"))
    if pattern == "bidirectional_self":
        local, strided = local | local.T, strided | strided.T
    if options["heads"] == "merged":
        return (local | strided).expand(HEADS, n, n)
    which = [head if options["heads"] == "split" else layer for head in range(HEADS)]
    return torch.stack([(local, strided)[i % 2] for i in which])


def named(options):
    return "-".join(str(x) for x in options.values())


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("options", STRIDED + FIXED, ids=named)
@pytest.mark.parametrize("length", [1, 63, 127])
def test_it_is_softmax_under_the_published_mask(length, options, pattern, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    allowed = expected_mask(length, options, pattern)[None]
    allowed = allowed if valid is None else allowed & valid[:, None, None]
    expected = softmax_attention(*tensors, allowed, 0.37)
    mask = AttentionMask(pattern, key_valid=valid)
    got = build(options)(*tensors, mask, scale=0.37).out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors)


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("options", [STRIDED[2], FIXED[0]], ids=named)
def test_a_thousand_tokens(options, pattern):
    tensors, valid = draw(1000, padding=0.2)
    options = {**options, "stride": 30}
    expected = softmax_attention(
        *tensors, expected_mask(1000, options, pattern)[None] & valid[:, None, None], DIM**-0.5
    )
    mask = AttentionMask(pattern, key_valid=valid)
    got = build(options)(*tensors, mask).out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("options", [*STRIDED, {**STRIDED[2], "heads": "interleaved"}, *FIXED], ids=named)
def test_the_pattern_is_exact(options, pattern, layer, padding):
    """With value = identity, output > 0 is the pattern; so are the reported lists and counts."""
    size = 61
    (q, k, _), valid = draw(size, dim=size, padding=padding)
    eye = torch.eye(size, dtype=torch.float64).expand_as(k)
    mask = AttentionMask(pattern, key_valid=valid)
    out = build(options, dim=size, layer=layer)(q, k, eye, mask, context=AttentionContext(collect_stats=True))
    expected = expected_mask(size, options, pattern, layer)[None]
    expected = (expected if valid is None else expected & valid[:, None, None]).expand_as(out.out)
    assert torch.equal(out.out > 0, expected)
    lists = out.stats.layout.token_mask(causal=mask.causal, key_valid=valid)
    assert torch.equal(lists.expand_as(expected), expected)
    assert torch.equal(out.stats.attended, expected.sum((-1, -2)).double())


def test_float16_holds_large_products():
    """q . k exceeds 65504 here, the scaled logits do not."""
    q = torch.full((1, 1, 40, 64), 40.0, dtype=torch.float16)
    module = build_attention("sparse", {"pattern": "strided", "stride": 7}, AttentionShape(1, 1, 64))
    out = module(q, q, q, AttentionMask("causal_self")).out
    assert torch.equal(out, q)


@pytest.mark.parametrize("options", [*STRIDED, *FIXED], ids=named)
def test_decoding_reads_the_same_keys(options):
    """From any position, in steps of any size, through the kernel instead of the grid."""
    (q, k, v), _ = draw(50)
    module = build(options)
    whole = module(q, k, v, AttentionMask("causal_self")).out
    for start, stop in ((1, 2), (13, 14), (17, 40), (49, 50)):
        mask = AttentionMask("causal_self", query_offset=start)
        step = module(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask).out
        torch.testing.assert_close(step, whole[:, :, start:stop], rtol=0, atol=1e-12)


def test_the_layout_is_built_once_for_each_size():
    (q, k, v), _ = draw(40)
    module, mask = build(FIXED[0]), AttentionMask("causal_self")
    module(q, k, v, mask)
    first = module._layout[1]
    module(q, k, v, mask)
    assert module._layout[1] is first
    module(q[:, :, :39], k[:, :, :39], v[:, :, :39], mask)
    assert module._layout[1] is not first


@pytest.mark.parametrize("options", STRIDED, ids=named)
@pytest.mark.parametrize("pattern", SELF)
def test_flops_of_a_grid_are_what_the_counter_sees(pattern, options):
    (q, k, v), _ = draw(96)
    mask, module = AttentionMask(pattern), build(options)
    with FlopCounterMode(display=False) as counter:
        module(q.float(), k.float(), v.float(), mask)
    assert module.flops(BATCH, 96, 96, mask) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "pattern", "offset"),
    [*((options, pattern, 0) for options in FIXED for pattern in SELF),
     *((options, "causal_self", 95) for options in STRIDED + FIXED)],
    ids=lambda x: named(x) if isinstance(x, dict) else str(x),
)  # fmt: skip
def test_flops_of_lists_are_those_of_the_pairs_that_are_seen(options, pattern, offset):
    (q, k, v), _ = draw(96)
    mask, module = AttentionMask(pattern, offset), build(options)
    stats = module(q[:, :, offset:], k, v, mask, context=AttentionContext(collect_stats=True)).stats
    assert module.flops(BATCH, 96 - offset, 96, mask) == 4 * DIM * int(stats.attended.expand(BATCH, HEADS).sum())


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_no_tensor_grows_with_the_square(pattern, largest_tensor):
    length, stride = 8192, 128
    q = torch.randn(1, 1, length, 4)
    module = build_attention("sparse", {"pattern": pattern, "stride": stride}, AttentionShape(1, 1, 4))
    with largest_tensor() as largest:
        module(q, q, q, AttentionMask("causal_self"))
    assert largest.elements <= length * (2 * stride + length // stride) < length * length / 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 100}, r"--attention.stride must be a multiple of --attention.block_size=16, got 100"),
        ({"stride": 32}, r"--attention.num_verts must be at most 2: a window of 2 blocks"),
        ({"heads": "split"}, r"--attention.heads must be merged when --attention.pattern=fixed, got 'split'"),
        ({"pattern": "local"}, r"--attention.pattern must be one of strided, fixed, got 'local'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        build(options)
