"""A decoding step on the CPU: one row gathers its own keys."""

from dataclasses import replace

import pytest
import torch

from astbench_kernels import BlockLayout, block_sparse_attention
from astbench_kernels.attention import what_runs
from astbench_kernels.backends.cpu.one_row import is_fused
from astbench_kernels.dispatch import rules

BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 6, 3, 5, 4


def step(keys, block, group, *, lists=HEADS, carried=False, offset=None, stride=1, seed=0):
    """Inputs in float64 with gradients, their lists, and which keys are no padding."""
    g = torch.Generator().manual_seed(seed)
    offset = keys * stride - 1 if offset is None else offset
    q, k, v = (
        torch.randn(BATCH, heads, length, dim, generator=g, dtype=torch.float64, requires_grad=True)
        for heads, length, dim in ((HEADS, 1, DIM), (KV_HEADS, keys, DIM), (KV_HEADS, keys, VALUE_DIM))
    )
    keep = torch.rand(BATCH, lists, 1, -(-keys // block), generator=g) < 0.5
    layout = BlockLayout.from_mask(
        keep, block_size=block, query_group=group, query_length=1, key_length=keys, query_offset=offset,
        key_stride=stride,
    )  # fmt: skip
    if carried:
        since = torch.randint(0, group + 1, layout.indices.shape, generator=g, dtype=torch.int32)
        layout = replace(layout, since=since)
    bias = torch.randn(layout.indices.shape, generator=g, dtype=torch.float64, requires_grad=True)
    return (q, k, v, bias), layout, torch.rand(BATCH, keys, generator=g) < 0.7


def results(inputs, layout, valid, backend, causal):
    """Output, log-sum-exp, and the gradients of both."""
    q, k, v, bias = inputs
    out, lse = block_sparse_attention(q, k, v, layout, block_bias=bias, causal=causal, key_valid=valid, backend=backend)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g, dtype=out.dtype)).sum()
    loss = loss + lse.masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, inputs)


def every_case(test):
    """With lengths, places in a tile, lists and padding of all kinds."""
    lengths = [
        (96, 16, 1, None, 1, True),
        (97, 16, 64, None, 1, True),  # a short last block, the middle of a tile
        (97, 16, 64, 60, 1, True),  # keys behind the row
        (97, 16, 4, 20, 1, False),
        (24, 8, 4, None, 4, True),  # coarse keys
        (1, 4, 4, None, 1, True),
    ]
    test = pytest.mark.parametrize(("keys", "block", "group", "offset", "stride", "causal"), lengths)(test)
    test = pytest.mark.parametrize("lists", [1, KV_HEADS, HEADS])(test)
    test = pytest.mark.parametrize("carried", [False, True])(test)
    return pytest.mark.parametrize("padded", [False, True])(test)


@every_case
def test_is_the_reference_with_gradients(keys, block, group, offset, stride, causal, lists, carried, padded):
    inputs, layout, valid = step(keys, block, group, lists=lists, carried=carried, offset=offset, stride=stride)
    valid = valid if padded else None
    got, wanted = (results(inputs, layout, valid, name, causal) for name in ("gather", "reference"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.fixture(params=["one_row", "whole_row"])
def way(request, monkeypatch):
    """Either way, whatever the lists name."""
    for name in ("WHOLE_ROW", "WHOLE_ROW_OF_SEVERAL"):
        monkeypatch.setattr(rules, name, 0.0 if request.param == "whole_row" else 1e9)
    return request.param


def plain(inputs):
    """Inputs without gradients and bias, values as wide as keys: what torch's fused kernel takes."""
    q, k, v, _ = (x.detach() for x in inputs)
    return q, k, torch.cat([v, v[..., :1]], -1)


@every_case
def test_is_the_reference_without_gradients(way, keys, block, group, offset, stride, causal, lists, carried, padded):
    inputs, layout, valid = step(keys, block, group, lists=lists, carried=carried, offset=offset, stride=stride)
    q, k, v = plain(inputs)
    got, wanted = (
        block_sparse_attention(q, k, v, layout, causal=causal, key_valid=valid if padded else None, backend=name)
        for name in ("gather", "reference")
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert what_runs("gather", q, k, v, layout, causal=causal) == f"gather ({way.replace('_', '-')})"


def test_without_torchs_fused_kernel_keys_are_gathered_and_it_says_so():
    (q, k, v, bias), layout, _ = step(64, 8, 16)
    still = plain((q, k, v, bias))
    assert what_runs("gather", *still, layout, causal=True) == "gather (whole-row)"
    bias = bias.detach()
    assert what_runs("gather", *still, layout, causal=True, block_bias=bias) == "gather (one-row)"
    assert what_runs("gather", *still[:2], v.detach(), layout, causal=True) == "gather (one-row)"  # of another size
    assert what_runs("gather", q, *still[1:], layout, causal=True) == "gather (one-row)"  # which learns
    assert not is_fused(*(x.to("meta") for x in still), None)


def test_all_keys_are_read_where_lists_name_most():
    q, k, v = plain(step(64, 8, 16)[0])
    keep = torch.zeros(BATCH, HEADS, 1, 8, dtype=torch.bool)
    sizes = {"block_size": 8, "query_group": 16, "query_length": 1, "key_length": 64, "query_offset": 63}
    for blocks, runs in ((2, "gather (one-row)"), (3, "gather (whole-row)"), (8, "gather (whole-row)")):
        keep[..., :blocks] = True  # of 8, for each of the two query heads of a key/value head
        assert what_runs("gather", q, k, v, BlockLayout.from_mask(keep, **sizes), causal=True) == runs
    for blocks, runs in ((4, "gather (whole-row)"), (3, "gather (one-row)")):  # a list a key/value head
        keep[..., blocks:] = False
        layout = BlockLayout.from_mask(keep[:, :KV_HEADS], **sizes)
        assert what_runs("gather", q, k, v, layout, causal=True) == runs


@pytest.mark.parametrize("lists", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("offset", [63, 40])
def test_lists_that_name_every_block_are_dense_attention(lists, offset):
    (q, k, _, _), layout, _ = step(64, 16, 64, lists=lists, offset=offset)
    keep = torch.ones(BATCH, lists, 1, 4, dtype=torch.bool)
    shape = {"block_size": 16, "query_length": 1, "key_length": 64, "query_offset": offset}
    seen = torch.arange(64) <= offset
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=seen[None], enable_gqa=True)
    with torch.no_grad():
        for layout in (
            BlockLayout.from_mask(keep, query_group=1, **shape),
            BlockLayout.carried(keep, query_group=64, **shape),
        ):
            torch.testing.assert_close(block_sparse_attention(q, k, k, layout, causal=True)[0], dense)
        late = replace(layout, since=layout.since.masked_fill(layout.indices == 1, offset % 64 + 1))
        seen = seen & (torch.arange(64) // 16 != 1)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=seen[None], enable_gqa=True)
        torch.testing.assert_close(block_sparse_attention(q, k, k, late, causal=True)[0], dense)


def test_takes_every_step_and_says_so():
    inputs, layout, _ = step(64, 8, 16)
    q, k, v = plain(inputs)
    assert what_runs("gather", q, k, v, layout, causal=True) == "gather (whole-row)"
    rows = torch.cat([q, q], 2)
    two = replace(layout, query_length=2, query_offset=62)
    assert "row)" not in what_runs("gather", rows, k, v, two, causal=True)
    assert rules.gather_of(shapes(1)) == "whole_row" != rules.gather_of(shapes(2))


def shapes(query_length):
    """A call, as `describe --explain` knows it."""
    return rules.Shapes("cpu", "float32", 1, HEADS, KV_HEADS, HEADS, DIM, query_length, 64, 8, 16, 0.5, True)


def test_pieces_change_nothing(monkeypatch):
    inputs, layout, valid = step(97, 16, 64, carried=True)
    monkeypatch.setattr(rules, "WHOLE_ROW_OF_SEVERAL", 1e9)

    def run():
        return block_sparse_attention(*plain(inputs), layout, causal=True, key_valid=valid, backend="gather")

    whole = run()
    monkeypatch.setattr(rules, "ROW_BYTES", 1)
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alone", range(4))
def test_any_input_may_be_the_only_one_that_learns(alone):
    inputs, layout, valid = step(97, 16, 64)
    wanted = results(inputs, layout, valid, "reference", True)[2:][alone]
    plain = [x.detach().requires_grad_(i == alone) for i, x in enumerate(inputs)]
    q, k, v, bias = plain
    out, lse = block_sparse_attention(q, k, v, layout, block_bias=bias, causal=True, key_valid=valid, backend="gather")
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)).sum()
    (loss + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    got = plain[alone].grad
    torch.testing.assert_close(torch.zeros_like(wanted) if got is None else got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_hidden_never_matters(poison):
    """Padding, blocks that no list names, keys behind the row, and blocks that only later rows of the tile see."""
    inputs, layout, valid = step(97, 16, 64, carried=True, lists=KV_HEADS, offset=70)
    clean = results(inputs, layout, valid, "gather", True)
    seen = layout.token_mask(causal=True, key_valid=valid)[:, :, 0]  # (batch, list heads, keys)
    assert 0 < seen.sum() < seen.numel()
    spoilt = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for x in spoilt[1:3]:
            x[~seen] = poison
    got = results(spoilt, layout, valid, "gather", True)
    torch.testing.assert_close(got, clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_hidden_never_matters_without_gradients(way, dtype, where, poison):
    inputs, layout, valid = step(97, 16, 64, carried=True, lists=KV_HEADS, offset=70)
    q, k, v = (x.to(dtype) for x in plain(inputs))
    clean = block_sparse_attention(q, k, v, layout, causal=True, key_valid=valid, backend="gather")
    (k if where == "keys" else v)[~layout.token_mask(causal=True, key_valid=valid)[:, :, 0]] = poison
    got = block_sparse_attention(q, k, v, layout, causal=True, key_valid=valid, backend="gather")
    torch.testing.assert_close(got, clean, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_rows_that_see_nothing(way):
    inputs, layout, _ = step(64, 8, 16)
    q, k, v = plain(inputs)
    hidden = torch.zeros(BATCH, 64, dtype=torch.bool)
    out, lse = block_sparse_attention(q, k, v, layout, causal=True, key_valid=hidden, backend="gather")
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_rounds_as_dense_does(way, dtype):
    inputs, layout, valid = step(97, 16, 64)
    small = [x.to(dtype) for x in plain(inputs)]
    got, lse = block_sparse_attention(*small, layout, causal=True, key_valid=valid, backend="gather")
    wanted, _ = block_sparse_attention(
        *(x.double() for x in small), layout, causal=True, key_valid=valid, backend="reference"
    )
    assert (got.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_keys_of_a_cache_with_room_are_read_where_they_lie():
    (q, k, v, _), layout, valid = step(97, 16, 64)
    roomy = [torch.cat([x.detach(), torch.full_like(x, torch.nan)], 2)[:, :, :97] for x in (k, v)]
    got = block_sparse_attention(q, *roomy, layout, causal=True, key_valid=valid, backend="gather")
    wanted = block_sparse_attention(q, k, v, layout, causal=True, key_valid=valid, backend="gather")
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
