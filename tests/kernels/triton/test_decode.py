"""The decode schedule against the float64 oracle, on memory that is NaN wherever no row may look."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from astbench_kernels import BlockLayout, block_sparse_attention
from astbench_kernels.triton import plan as planning
from astbench_kernels.triton import triton_attention
from astbench_kernels.triton.plan import make_plan
from tests.kernels.triton.test_triton import DEVICE, Case, pytestmark  # noqa: F401
from tests.kernels.triton.test_triton import make as make_full
from tests.oracles import TOLERANCE, relative_error

CASES = {
    "one-key": Case(1, 1, 16, 1, lists=1),
    "one-token": Case(1, 150, 16, 1, offset=149, batch=2),
    "one-token-of-a-long-group": Case(1, 150, 16, 64, offset=149, batch=2, lists=2),
    "carried": Case(1, 150, 16, 64, offset=149, batch=2, lists=2, keep=0.9, carried=True),
    "carried-blocks-of-128": Case(1, 650, 128, 64, offset=649, lists=1, keep=0.9, carried=True),
    "carried-several": Case(3, 150, 16, 64, offset=146, lists=2, keep=0.9, carried=True),
    "blocks-of-32": Case(1, 290, 32, 1, offset=289, batch=3, lists=1),
    "blocks-of-64": Case(1, 420, 64, 1, offset=419, lists=2, heads=6),
    "blocks-of-128": Case(1, 900, 128, 1, offset=899, lists=2),
    "blocks-of-128-in-parts": Case(1, 650, 128, 1, offset=649, lists=1, dim=72),
    "uneven-blocks-of-12": Case(1, 111, 12, 1, offset=110, batch=2, lists=2),
    "uneven-blocks-of-48": Case(1, 210, 48, 1, offset=209, batch=2, lists=2, dtype=torch.float16),
    "uneven-blocks-of-80": Case(1, 390, 80, 1, offset=389, lists=2),
    "tiny-blocks": Case(1, 61, 4, 1, offset=60, lists=1, padding="tail", batch=2),
    "keys-after-the-token": Case(1, 430, 64, 1, offset=140, lists=2),
    "no-keys-yet": Case(2, 90, 16, 1, lists=2),
    "several-tokens": Case(5, 155, 16, 1, offset=150, lists=1, keep=0.3),
    "several-tokens-two-groups": Case(7, 340, 64, 4, offset=331, lists=2),
    "rows-in-two-tiles": Case(7, 130, 16, 16, offset=117, lists=1, heads=12, kv_heads=2),
    "list-per-query-head": Case(1, 97, 16, 1, offset=96, heads=6, kv_heads=3, lists=6),
    "list-per-kv-head": Case(1, 97, 16, 1, offset=96, heads=6, kv_heads=3, lists=3),
    "one-list": Case(1, 97, 16, 1, offset=96, heads=6, kv_heads=3, lists=1),
    "many-heads-one-kv-head": Case(1, 340, 64, 1, offset=339, heads=40, kv_heads=1, lists=1),
    "tail-padding": Case(1, 373, 64, 1, offset=372, padding="tail", batch=2, lists=2),
    "holes": Case(3, 173, 32, 2, offset=170, padding="holes", lists=2),
    "cross": Case(3, 73, 16, 1, causal=False, lists=2, dim=24, value_dim=40),
    "cross-padded": Case(1, 405, 64, 1, causal=False, lists=1, value_dim=24, padding="tail", batch=2),
    "no-bias": Case(1, 345, 64, 1, offset=344, bias=False, lists=1),
    "no-bias-small-blocks": Case(1, 85, 16, 1, offset=84, bias=False, lists=1),
    "head-96": Case(1, 333, 64, 1, offset=332, dim=96, value_dim=96, lists=1),
    "head-128": Case(1, 333, 64, 1, offset=332, dim=128, value_dim=128, lists=1),
    "float16": Case(1, 433, 64, 1, offset=432, dtype=torch.float16, lists=2),
    "float16-small-blocks": Case(3, 133, 16, 1, offset=130, dtype=torch.float16, padding="holes", lists=2),
    "bfloat16": Case(1, 733, 128, 1, offset=732, dtype=torch.bfloat16, lists=2),
}
DIRECT = ["one-key", "one-token", "blocks-of-64", "several-tokens-two-groups", "holes", "cross-padded", "float16"]
"""Cases that are tried without splits too: then the caller's memory is written at once."""


def make(case):
    """Also the list that would name every block leaves a quarter of them out."""
    inputs, layout, valid = make_full(case)
    return inputs, replace(layout, counts=layout.counts - layout.counts // 4), valid


def seen_keys(case, layout, valid):
    """Bool `(batch, kv_heads, keys, 1)`: keys that some row of the KV head may see."""
    pairs = layout.expand_heads(case.heads).token_mask(causal=case.causal, key_valid=valid)
    return pairs.any(2).view(case.batch, case.kv_heads, -1, case.keys).any(2)[..., None]


def poisoned(case, inputs, layout, valid):
    """The same call with NaN before, between and after what its rows see, and lists whose empty slots mislead."""
    q, k, v, bias = inputs
    seen = seen_keys(case, layout, valid)
    block = case.block
    k, v = (pad(x.masked_fill(~seen, torch.nan), (0, 0, block, block), value=torch.nan) for x in (k, v))
    k, v = (x[:, :, block : block + case.keys] for x in (k, v))
    bias = bias.masked_fill(~layout.slots, torch.nan)
    return [q, k, v, bias], replace(layout, indices=layout.indices.masked_fill(~layout.slots, -1))


@torch.no_grad()
def decode(case, inputs, layout, valid, schedule="decode"):
    q, k, v, bias = inputs
    return triton_attention(
        q, k, v, layout, block_bias=bias if case.bias else None, scale=case.dim**-0.5, causal=case.causal,
        key_valid=valid, schedule=schedule,
    )  # fmt: skip


@torch.no_grad()
def reference(case, inputs, layout, valid):
    q, k, v, bias = (x.double() for x in inputs)
    return block_sparse_attention(
        q, k, v, layout, block_bias=bias if case.bias else None, causal=case.causal, key_valid=valid,
        backend="reference",
    )  # fmt: skip


def compare(case, got, expected):
    (out, lse), (expected_out, expected_lse) = got, expected
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    for a, b in ((out, expected_out), (lse.masked_fill(empty, 0), expected_lse.masked_fill(empty, 0))):
        assert relative_error(a, b) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("name", "splits"), [(name, 3) for name in CASES] + [(name, 1) for name in DIRECT], ids=lambda x: str(x)
)
def test_output(name, splits, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(planning.Plan, "num_splits", splits)
    inputs, layout, valid = make(case)
    assert not seen_keys(case, layout, valid).all() or case.keys == 1, "without hidden keys nothing is poisoned"
    expected = reference(case, inputs, layout, valid)
    compare(case, decode(case, *poisoned(case, inputs, layout, valid), valid), expected)


@pytest.mark.parametrize("splits", [16, 37])
def test_more_splits_than_entries_and_than_one_round_of_merging(splits, monkeypatch):
    case = Case(2, 500, 16, 1, offset=498, lists=1, heads=2, kv_heads=1)
    monkeypatch.setattr(planning.Plan, "num_splits", splits)
    inputs, layout, valid = make(case)
    assert 8 < int(layout.counts.max()) * case.block // 32 < 16, "most splits get something, some nothing"
    compare(case, decode(case, *poisoned(case, inputs, layout, valid), valid), reference(case, inputs, layout, valid))


def test_splits_take_even_shares_of_each_list(monkeypatch):
    """Of what the list holds, not of its room: no split of a short list is idle."""
    from astbench_kernels.triton.attention import function

    case = Case(1, 490, 32, 1, offset=489, lists=2)
    monkeypatch.setattr(planning.Plan, "num_splits", 5)
    seen, launch = {}, function.launch

    def record(kernel, programs, arguments, constants, tile):
        launch(kernel, programs, arguments, constants, tile)
        seen[kernel.__name__] = arguments

    monkeypatch.setattr(function, "launch", record)
    inputs, layout, valid = make(case)
    counts = torch.tensor([[[5], [layout.indices.shape[-1]]]], dtype=torch.int32, device=DEVICE)
    decode(case, inputs, replace(layout, counts=counts), valid)
    assert int(counts.max()) > 2 * 5 and seen["merge"]["partial_lse"].shape == (1, 4, 1, 5)
    assert seen["merge"]["partial_lse"].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_lists_without_entries(splits, monkeypatch):
    case = Case(1, 70, 16, 1, offset=69, lists=1)
    monkeypatch.setattr(planning.Plan, "num_splits", splits)
    inputs, layout, valid = make(case)
    layout = replace(layout, counts=torch.zeros_like(layout.counts))
    out, lse = decode(case, *poisoned(case, inputs, layout, valid), valid)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("one-list", "query_major"), ("one-list", "key_major"), ("uneven-blocks-of-80", "query_major"),
     ("holes", "query_major"), ("several-tokens-two-groups", "key_major")],
)  # fmt: skip
def test_equals_the_other_schedules(name, schedule):
    case = CASES[name]
    inputs, layout, valid = make(case)
    expected = decode(case, inputs, layout, valid, schedule)
    for got, other in zip(decode(case, inputs, layout, valid), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cache", "group"), [("growing", 1), ("static", 4)])
def test_step_by_step_equals_the_full_pass(cache, group):
    """Token after token on the keys so far, in a cache that ends there or holds NaN from there on."""
    case = Case(11, 11, 4, group, lists=2)
    (q, k, v, _), drawn, _ = make(case)
    block = torch.arange(drawn.num_blocks, device=DEVICE)
    started = block * case.block < (torch.arange(drawn.num_groups, device=DEVICE)[:, None] + 1) * group
    layout = BlockLayout.from_mask(
        drawn.to_mask() & started, block_size=case.block, query_group=group, query_length=11, key_length=11
    )
    bias = torch.randn(layout.indices.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    full_out, full_lse = decode(case, (q, k, v, bias), layout, None, "query_major")
    for i in range(case.queries):
        here, keys = slice(i // group, i // group + 1), i + 1 if cache == "growing" else case.keys
        step = BlockLayout(
            layout.indices[:, :, here], layout.counts[:, :, here], case.block, group, 1, keys, query_offset=i
        )
        later = (torch.arange(case.keys, device=DEVICE) > i)[:, None]
        past = [x.masked_fill(later, torch.nan)[:, :, :keys] for x in (k, v)]
        out, lse = decode(case, (q[:, :, i : i + 1], *past, bias[:, :, here]), step, None)
        torch.testing.assert_close(out[:, :, 0], full_out[:, :, i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, :, 0], full_lse[:, :, i], rtol=1e-5, atol=1e-5)


def test_any_strides():
    case = CASES["several-tokens"]
    inputs, layout, valid = make(case)
    expected = decode(case, inputs, layout, valid)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    turned[2] = turned[2].transpose(2, 3).contiguous().transpose(2, 3)
    for got, other in zip(decode(case, [*turned, inputs[3]], layout, valid), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=0, atol=1e-6)


# ----- when it runs, and what follows from shapes alone


def on_meta(case, width=None):
    """q, k, v, block_bias and a layout without values: whoever reads one fails."""
    lists = (case.batch, case.lists, -(-(case.offset + case.queries) // case.group) - case.offset // case.group)
    indices = torch.empty(*lists, width or -(-case.keys // case.block), dtype=torch.int32, device="meta")
    counts = torch.empty(*lists, dtype=torch.int32, device="meta")
    layout = BlockLayout(indices, counts, case.block, case.group, case.queries, case.keys, case.offset)
    q = torch.empty(case.batch, case.heads, case.queries, case.dim, dtype=case.dtype, device="meta")
    k = torch.empty(case.batch, case.kv_heads, case.keys, case.dim, dtype=case.dtype, device="meta")
    v = torch.empty(case.batch, case.kv_heads, case.keys, case.value_dim, dtype=case.dtype, device="meta")
    return [q, k, v, torch.empty(indices.shape, device="meta")], layout


STEP = Case(1, 8192, 64, 1, offset=8191, heads=32, kv_heads=8, lists=8, dim=128, value_dim=128, dtype=torch.float16)


@pytest.mark.parametrize(
    ("case", "schedule"),
    [
        pytest.param(STEP, "decode", id="one-token"),
        pytest.param(replace(STEP, batch=64), "decode", id="a-batch-that-fills-the-device"),
        pytest.param(replace(STEP, queries=4, offset=8188), "decode", id="four-tokens"),
        pytest.param(replace(STEP, queries=4, offset=8188, batch=64), "key_major", id="four-tokens-of-a-full-batch"),
        pytest.param(replace(STEP, queries=33, offset=8159), "key_major", id="132-rows"),
        pytest.param(replace(STEP, group=16), "decode", id="one-token-of-a-group"),
        pytest.param(replace(STEP, kv_heads=1, lists=1, heads=71), "decode", id="71-heads-one-kv-head"),
        pytest.param(replace(STEP, queries=8192, offset=0, group=16), "query_major", id="prompt"),
    ],
)
def test_few_rows_without_gradients_choose_it(case, schedule):
    inputs, layout = on_meta(case)
    assert make_plan(*inputs[:3], layout, causal=True, gradients=False).schedule == schedule
    assert make_plan(*inputs[:3], layout, causal=True).schedule != "decode"


def launched(run, inputs, layout, **options):
    """What a call launches, as (kernel, splits)."""
    from astbench_kernels.triton.launch import writing_down

    q, k, v, bias = inputs
    with writing_down() as written:
        run(q, k, v, layout, block_bias=bias, causal=True, **options)
    return [(launch.kernel.__name__, launch.arguments.get("splits")) for launch in written]


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_keep_the_public_call_off_it(wanted, monkeypatch):
    case = Case(1, 97, 16, 1, offset=96)
    monkeypatch.setattr(planning.Plan, "num_splits", 2)
    inputs, layout, _ = make(case)
    steps = [("forward", 2), ("merge", 2)]
    assert launched(block_sparse_attention, inputs, layout, backend="triton") == steps
    inputs[wanted].requires_grad_()
    assert not set(steps) & set(launched(block_sparse_attention, inputs, layout, backend="triton"))
    with torch.no_grad():
        assert launched(block_sparse_attention, inputs, layout, backend="triton") == steps
    with pytest.raises(ValueError, match="no backward pass, but gradients are wanted; call it under no_grad"):
        launched(triton_attention, inputs, layout, scale=1.0, key_valid=None, schedule="decode")


@pytest.mark.parametrize(
    ("case", "width", "splits"),
    [
        pytest.param(STEP, 128, 33, id="enough-programs-for-the-device"),
        pytest.param(STEP, 32, 16, id="two-steps-for-each"),
        pytest.param(replace(STEP, batch=4), 128, 8, id="more-of-a-batch-fewer-splits"),
        pytest.param(replace(STEP, batch=33), 128, 1, id="full-batch"),
        pytest.param(replace(STEP, kv_heads=1, lists=1), 1024, 128, id="as-many-as-one-merge-takes"),
        pytest.param(replace(STEP, block=16), 128, 16, id="blocks-of-16"),
        pytest.param(STEP, 1, 1, id="one-block"),
    ],
)
def test_splits_follow_from_shapes(case, width, splits):
    inputs, layout = on_meta(case, width)
    expected = [("forward", 1)] if splits == 1 else [("forward", splits), ("merge", splits)]
    assert launched(triton_attention, inputs, layout, scale=1.0, key_valid=None) == expected
