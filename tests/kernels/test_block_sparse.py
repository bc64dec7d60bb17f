"""Gather and FlexAttention against the float64 oracle; the oracle against masked softmax written out."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from astbench_kernels import BlockLayout, block_sparse_attention, log_mass, select_blocks, soft_top_k, what_runs
from astbench_kernels import selection as select
from astbench_kernels.backends.cpu import key_major
from astbench_kernels.backends.cpu import query_major as gather
from astbench_kernels.backends.cpu.units import lists_together
from astbench_kernels.dispatch import rules

# Distinct primes, so that a swapped axis cannot pass.
BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 5

CASES = [
    # query_length, key_length, block_size, query_group, query_offset, causal
    pytest.param(1, 1, 16, 16, 0, False, id="one-token"),
    pytest.param(63, 63, 16, 8, 0, True, id="causal-63-group8"),
    pytest.param(127, 127, 16, 1, 0, True, id="causal-127-per-token"),
    pytest.param(101, 73, 8, 32, 0, False, id="cross-101x73"),
    pytest.param(1, 97, 16, 1, 96, True, id="decode-last"),
    pytest.param(11, 97, 16, 4, 85, True, id="decode-chunk-mid-group"),
    pytest.param(1000, 1000, 64, 128, 0, False, id="long-1000"),
]


WAYS = ["query-major", "key-major", "masked", "masked in slabs"]


def take(monkeypatch, way):
    """The gather backend goes this way, whatever the shape."""
    if way == "masked in slabs":  # which otherwise hold whole lists here
        for name, size in (("CHUNK_PAIRS", 1000), ("SLAB_PAIRS", 1000), ("SLAB_ROWS", 24)):
            monkeypatch.setattr(rules, name, size)
    monkeypatch.setattr(gather, "schedule_of", lambda *args, **kwargs: way.partition(" ")[0].replace("-", "_"))


@pytest.fixture(params=WAYS)
def schedule(request, monkeypatch):
    """Every way of the gather backend, whatever the shape."""
    take(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=[*(f"gather, {way}" for way in WAYS), "flex"])
def backend(request, monkeypatch):
    """Every backend that runs on the CPU beside the oracle, gather in every way."""
    name, _, way = request.param.partition(", ")
    take(monkeypatch, way)
    return name


def random_case(
    query_length, key_length, block_size, query_group, offset, lists=HEADS, seed=0, dtype=torch.float64, carried=False
):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, query_length, DIM, generator=g, dtype=torch.float64)
    k = torch.randn(BATCH, KV_HEADS, key_length, DIM, generator=g, dtype=torch.float64)
    v = torch.randn(BATCH, KV_HEADS, key_length, DIM, generator=g, dtype=torch.float64)
    groups = (offset + query_length + query_group - 1) // query_group - offset // query_group
    keep = torch.rand(BATCH, lists, groups, -(-key_length // block_size), generator=g) < 0.4
    layout = BlockLayout.from_mask(
        keep, block_size=block_size, query_group=query_group, query_length=query_length,
        key_length=key_length, query_offset=offset,
    )  # fmt: skip
    bias = torch.randn(layout.indices.shape, generator=g, dtype=torch.float64)
    if carried:
        since = torch.randint(-query_group // 2, query_group + 1, layout.indices.shape, generator=g, dtype=torch.int32)
        layout = replace(layout, since=since.clamp(min=0))
    valid = torch.rand(BATCH, key_length, generator=g) < 0.8
    return [x.to(dtype).requires_grad_() for x in (q, k, v, bias)], layout, valid


def brute_force(q, k, v, bias, layout, causal, valid):
    """Row by row, no broadcasting tricks: the definition."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.full(q.shape[:3], -torch.inf).to(q)
    lists, repeats = layout.indices.shape[1], q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                position = i + layout.query_offset
                group = position // layout.query_group - layout.first_group
                listing = h * lists // q.shape[1]
                keys, biases = [], []
                for slot in range(int(layout.counts[b, listing, group])):
                    if (
                        layout.since is not None
                        and position % layout.query_group < layout.since[b, listing, group, slot]
                    ):
                        continue
                    block = int(layout.indices[b, listing, group, slot])
                    for j in range(block * layout.block_size, min((block + 1) * layout.block_size, k.shape[2])):
                        if valid[b, j] and (not causal or j <= position):
                            keys.append(j)
                            biases.append(bias[b, listing, group, slot])
                if keys:
                    logits = k[b, h // repeats, keys] @ q[b, h, i] * q.shape[-1] ** -0.5 + torch.stack(biases)
                    lse[b, h, i] = logits.logsumexp(0)
                    out[b, h, i] = logits.softmax(0) @ v[b, h // repeats, keys]
    return out, lse


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("lists", [1, KV_HEADS, HEADS])
def test_reference_is_the_definition(lists, carried):
    (q, k, v, bias), layout, valid = random_case(13, 29, 4, 3, 2, lists, carried=carried)
    with torch.no_grad():
        expected = brute_force(q, k, v, bias, layout, True, valid)
        got = block_sparse_attention(
            q, k, v, layout, block_bias=bias, causal=True, key_valid=valid, backend="reference"
        )
    assert (expected[1] == -torch.inf).any(), "the case must hold rows that see nothing"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])  # without a bias torch's fused kernel is asked
@pytest.mark.parametrize("lists", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize(("n", "m", "block", "group", "offset", "causal"), CASES)
def test_backends_match_reference_with_gradients(
    backend, monkeypatch, n, m, block, group, offset, causal, lists, biased
):
    monkeypatch.setattr(rules, "FUSED_BYTES", 2**12)
    monkeypatch.setattr(key_major, "TILE_ROWS", 50)
    monkeypatch.setattr(key_major, "PARTIAL_ROWS", 90)
    monkeypatch.setattr(key_major, "CHUNK_ROWS", 24)
    results = {}
    for name in ("reference", backend):
        inputs, layout, valid = random_case(n, m, block, group, offset, lists)
        q, k, v, bias = inputs if biased else (*inputs[:3], None)
        out, lse = block_sparse_attention(
            q, k, v, layout, block_bias=bias, causal=causal, key_valid=valid, backend=name
        )
        seen = lse > -torch.inf
        g = torch.Generator().manual_seed(1)
        loss = (out * torch.randn(out.shape, generator=g, dtype=out.dtype)).sum()
        loss = loss + (lse.masked_fill(~seen, 0) * torch.randn(lse.shape, generator=g, dtype=out.dtype)).sum()
        results[name] = (out, lse, *torch.autograd.grad(loss, inputs if biased else inputs[:3]))
    for got, expected in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("lists", [KV_HEADS, HEADS])
@pytest.mark.parametrize("way", ["query-major", "masked", "masked in slabs", "flex", "as chosen"])
@pytest.mark.parametrize(("n", "m", "block", "group", "offset", "causal"), CASES)
def test_carried_lists_match_reference_with_gradients(
    monkeypatch, way, n, m, block, group, offset, causal, lists, biased
):
    monkeypatch.setattr(rules, "FUSED_BYTES", 2**12)
    if way not in ("flex", "as chosen"):
        take(monkeypatch, way)
    results = {}
    for name in ("reference", "flex" if way == "flex" else "gather"):
        inputs, layout, valid = random_case(n, m, block, group, offset, lists, carried=True)
        q, k, v, bias = inputs if biased else (*inputs[:3], None)
        out, lse = block_sparse_attention(
            q, k, v, layout, block_bias=bias, causal=causal, key_valid=valid, backend=name
        )
        g = torch.Generator().manual_seed(1)
        loss = (out * torch.randn(out.shape, generator=g, dtype=out.dtype)).sum()
        loss = loss + lse.masked_fill(lse == -torch.inf, 0).sum()
        results[name] = (out, lse, *torch.autograd.grad(loss, inputs if biased else inputs[:3]))
    expected, got = results.values()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("carried", [False, True])
def test_a_bias_of_zeros_gets_its_gradient(backend, carried):
    """As the straight-through estimator has it: the output does not feel it, and comes from torch's fused kernel."""
    if carried and backend == "gather" and gather.schedule_of() == "key_major":
        pytest.skip("key by key, lists are not carried")
    results = []
    for name in ("reference", backend):
        inputs, layout, valid = random_case(63, 63, 16, 8, 0, carried=carried)
        leaves = [*inputs[:3], torch.zeros_like(inputs[3]).requires_grad_()]
        out, _ = block_sparse_attention(
            *leaves[:3], layout, block_bias=leaves[3], causal=True, key_valid=valid, backend=name
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert (results[0][4] != 0).any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["query-major", "masked"])
@pytest.mark.parametrize("carried", [False, True])
def test_bfloat16_is_rounded_as_dense_attention_rounds_it(monkeypatch, way, carried):
    """Against dense attention in bfloat16, of which the lists are the mask."""
    take(monkeypatch, way)
    inputs, layout, valid = random_case(100, 100, 8, 16, 0, carried=carried, dtype=torch.bfloat16)
    q, k, v = (x.detach() for x in inputs[:3])
    out, _ = block_sparse_attention(q, k, v, layout, causal=True, key_valid=valid, backend="gather")
    mask = layout.token_mask(causal=True, key_valid=valid)
    seen = mask.any(-1, keepdim=True)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~seen, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, dense.masked_fill(~seen, 0.0), rtol=0, atol=2**-6)


STRIDES = {
    "one kv head": (4, 1, lambda x: x),
    "one kv head, rows apart": (4, 1, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "the last dimension apart": (4, 2, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)),
    "one head, apart": (1, 1, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)),
}


@pytest.mark.parametrize("way", ["query-major", "masked"])
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "lay"), STRIDES.values(), ids=STRIDES)
def test_how_inputs_lie_in_memory_does_not_matter(monkeypatch, way, group, heads, kv_heads, lay):
    take(monkeypatch, way)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 64, 16, generator=g) for n in (heads, kv_heads, kv_heads))
    keep = torch.rand(1, kv_heads, 64 // group, 8, generator=g) < 0.6
    layout = BlockLayout.from_mask(keep, block_size=8, query_group=group, query_length=64, key_length=64)
    got, wanted = (
        block_sparse_attention(*inputs, layout, causal=True, backend=name)
        for inputs, name in (([lay(x) for x in (q, k, v)], "gather"), ((q, k, v), "reference"))
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_keys_that_a_row_may_not_see_may_hold_anything(monkeypatch, value):
    """Of a block that nobody lists, by which short lists are filled up, and later ones in the row's own block."""
    take(monkeypatch, "query-major")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 128, 16, generator=g) for _ in range(3))
    keep = torch.ones(1, 2, 8, 8, dtype=torch.bool).tril()
    keep[:, :, :, 0] = False
    layout = BlockLayout.from_mask(keep, block_size=16, query_group=16, query_length=128, key_length=128)
    spoilt = k.clone()
    spoilt[:, :, :16] = value
    spoilt[:, :, 100] = value
    got, wanted = (block_sparse_attention(q, x, v, layout, causal=True, backend="gather") for x in (spoilt, k))
    torch.testing.assert_close(got[0][:, :, :100], wanted[0][:, :, :100])
    torch.testing.assert_close(got[1][:, :, :100], wanted[1][:, :, :100])


@pytest.mark.parametrize("way", ["query-major", "masked"])
def test_gradients_in_bfloat16_owe_nothing_to_an_output_that_is_rounded(monkeypatch, way):
    """Values far from 0: what rounding the output does to rowsum(dO * O) is many times as much as d logits."""
    take(monkeypatch, way)
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        inputs, layout, _ = random_case(64, 64, 8, 16, 0, dtype=torch.bfloat16)
        q, k, v = (x.detach() for x in inputs[:3])
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v + 4)]
        out, _ = block_sparse_attention(*leaves, layout, causal=True, backend="gather")
        found[dtype] = torch.autograd.grad(out.sum(), leaves)
    for got, wanted in zip(found[torch.bfloat16][:2], found[torch.float64][:2], strict=True):
        assert (got.double() - wanted).norm() < 0.01 * wanted.norm()


def test_units_of_like_lists_are_computed_together():
    counts = sorted([0, 0, 3, 3, 3, 4, 40, 41])
    runs = list(lists_together(counts, 1, 100))
    assert runs == [(slice(2, 6), 4), (slice(6, 8), 41)]  # three blocks filled up; with the next it would be 85
    assert [width for _, width in lists_together([500, 600], 1, 100)] == [500, 600]  # longer than a run may be
    covered = [unit for units, _ in runs for unit in range(units.start, units.stop)]
    assert covered == [unit for unit, count in enumerate(counts) if count]


def test_layouts_of_consecutive_queries_are_joined():
    keep = rows_that_choose(40, 40, 4, 0)
    sizes = {"block_size": 4, "query_group": 8}
    for make in (BlockLayout.carried, BlockLayout.from_mask):
        rows = keep if make is BlockLayout.carried else keep[:, :, ::8]
        parts = []
        for start, stop in ((0, 16), (16, 24), (24, 40)):
            part = rows[:, :, start:stop] if make is BlockLayout.carried else rows[:, :, start // 8 : stop // 8]
            kept = part[..., : -(-stop // 4)]
            parts.append(make(kept, query_length=stop - start, key_length=stop, query_offset=start, **sizes))
        joined = BlockLayout.joined(parts, 40)
        whole = rows & (
            torch.arange(10) * 4 < torch.tensor([16] * 16 + [24] * 8 + [40] * 16)[:: 40 // rows.shape[2]][:, None]
        )
        expected = make(whole, query_length=40, key_length=40, **sizes)
        assert joined.sound
        assert torch.equal(joined.first_rows(), expected.first_rows())
        assert (joined.query_length, joined.key_length, joined.query_offset) == (40, 40, 0)


def rows_that_choose(n, m, block, offset, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(BATCH, HEADS, n, -(-m // block), generator=g) < 0.2


@pytest.mark.parametrize(
    ("n", "m", "block", "group", "offset"), [(64, 64, 8, 16, 0), (37, 50, 4, 16, 13), (5, 9, 3, 4, 2)]
)
def test_a_carried_list_is_what_a_row_and_the_rows_before_it_in_its_group_chose(n, m, block, group, offset):
    keep = rows_that_choose(n, m, block, offset)
    sizes = {"block_size": block, "query_length": n, "key_length": m, "query_offset": offset}
    layout = BlockLayout.carried(keep, query_group=group, **sizes)
    expected = torch.zeros(BATCH, HEADS, n, m, dtype=torch.bool)
    for row in range(n):
        first = max(0, row - (row + offset) % group)
        blocks = keep[:, :, first : row + 1].any(2)
        expected[:, :, row] = blocks.repeat_interleave(block, -1)[..., :m]
    assert torch.equal(layout.token_mask(causal=False), expected)
    causal = expected & (torch.arange(m) <= torch.arange(n)[:, None] + offset)
    assert torch.equal(layout.token_mask(causal=True), causal)
    for mask, name in ((expected, False), (causal, True)):
        pairs = layout.attended_pairs(causal=name)
        assert torch.equal(pairs, mask.sum((-1, -2)).double())
    assert layout.sound


def test_a_carried_list_goes_on_in_the_middle_of_a_group():
    keep, sizes = rows_that_choose(40, 64, 8, 0), {"block_size": 8, "query_group": 16, "key_length": 64}
    whole = BlockLayout.carried(keep, query_length=40, **sizes).token_mask(causal=True)
    before = None
    for start, stop in ((0, 11), (11, 12), (12, 16), (16, 30), (30, 40)):
        part = BlockLayout.carried(
            keep[:, :, start:stop], query_length=stop - start, query_offset=start, before=before, **sizes
        )
        assert torch.equal(part.token_mask(causal=True), whole[:, :, start:stop])
        before = part.first_rows()[:, :, -1] if stop % 16 else None


def test_tiles_are_those_that_hold_a_listed_pair():
    keep = rows_that_choose(40, 64, 8, 0)
    layout = BlockLayout.carried(keep, block_size=8, query_group=16, query_length=40, key_length=64)
    seen = layout.token_mask(causal=True)
    padded = torch.nn.functional.pad(seen, (0, 0, 0, 8)).unflatten(2, (3, 16)).unflatten(-1, (8, 8))
    visible = torch.ones(40, 64, dtype=torch.bool).tril()
    visible = torch.nn.functional.pad(visible, (0, 0, 0, 8)).unflatten(0, (3, 16)).unflatten(-1, (8, 8))
    listed, most = layout.tiles(causal=True)
    # A block that no row of the tile saw yet when the last one chose it is computed, too.
    assert (listed >= padded.any(-1).any(3).sum((-1, -2))).all()
    assert most == int(visible.any(-1).any(1).sum())
    everything = BlockLayout.carried(
        torch.ones_like(keep), block_size=8, query_group=16, query_length=40, key_length=64
    )
    assert torch.equal(everything.tiles(causal=True)[0], torch.full((BATCH, HEADS), float(most), dtype=torch.float64))


@pytest.mark.parametrize(("n", "group"), [(64, 1), (61, 4)], ids=["one-list-of-all-heads", "groups-stick-out"])
def test_one_sequence_whose_heads_share_lists_with_a_large_bias(schedule, n, group):
    """Views that only batch 1 allows; and where no query stands, no weight, however large the bias."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, n, 4, DIM, generator=g).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1, n, DIM, generator=g).requires_grad_() for _ in range(2))
    keep = torch.rand(1, 1, -(-n // group), 8, generator=g) < 0.5
    layout = BlockLayout.from_mask(keep, block_size=8, query_group=group, query_length=n, key_length=n)
    bias = torch.full(layout.indices.shape, 100.0, requires_grad=True)
    results = []
    for backend in ("gather", "reference"):
        out, lse = block_sparse_attention(q, k, v, layout, block_bias=bias, backend=backend)
        loss = out.square().sum() + lse[lse > -torch.inf].sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v, bias))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_costs_the_gradients_no_more_than_rounding_the_inputs(schedule):
    """The backward pass takes the unrounded output: delta = rowsum(dO * O) is a small difference of large numbers."""
    (q, k, v, bias), layout, _ = random_case(127, 127, 8, 4, 0, dtype=torch.float32)
    bias = bias.bfloat16()
    q, k, v = (x.detach().bfloat16() for x in (q, k, v + 8))  # values far from zero: what rounding costs shows
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)] + [bias.detach().to(dtype).requires_grad_()]
        out, _ = block_sparse_attention(*given[:3], layout, block_bias=given[3], causal=True, backend="gather")
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        grads.append(torch.autograd.grad(out, [given[0], given[3]], weight))
    for got, expected in zip(*grads, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 0.01, float(error)


@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_logits_may_lie_far_apart(backend, size, monkeypatch):
    """A row's references are raised where its logits leave the range of exp2, and nothing over- or underflows."""
    results, raised = {}, []
    raise_references = key_major._raise_references
    monkeypatch.setattr(key_major, "_raise_references", lambda *a: raised.append(1) or raise_references(*a))
    for name in ("reference", backend):
        (q, k, v, bias), layout, valid = random_case(127, 127, 8, 1, 0)
        q, bias = (q * size).detach().requires_grad_(), (bias * size).detach().requires_grad_()
        out, lse = block_sparse_attention(q, k, v, layout, block_bias=bias, causal=True, key_valid=valid, backend=name)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias))
        results[name] = (out, lse, *grads)
    for got, expected in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * size)
    assert bool(raised) == (gather.schedule_of() == "key_major" and size > 1)


def test_a_bias_may_hide_a_block(schedule):
    """-inf on a listed block, the first of its list among them, is as if it were not listed; all of them: zeros."""
    (q, k, v, _), layout, _ = random_case(64, 64, 8, 1, 0)
    bias = torch.zeros(layout.indices.shape, dtype=torch.float64)
    bias[:, :, ::3, 0] = -torch.inf
    bias[:, :, 7] = -torch.inf
    out, lse = block_sparse_attention(q, k, v, layout, block_bias=bias, causal=True, backend="gather")
    expected, _ = block_sparse_attention(q, k, v, layout, block_bias=bias, causal=True, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert (out[:, :, 7] == 0).all() and (lse[:, :, 7] == -torch.inf).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_blocks_of_the_future_cost_nothing(schedule, monkeypatch):
    """Listed or not, they are not seen; and key by key they make no tiles."""
    (q, k, v, _), _, _ = random_case(64, 64, 8, 1, 0)
    made = {"block_size": 8, "query_group": 1, "query_length": 64, "key_length": 64}
    everything = torch.ones(BATCH, HEADS, 64, 8, dtype=torch.bool)
    past = everything & (torch.arange(8) * 8 <= torch.arange(64)[:, None])
    seen = []
    tiles = key_major._Tiles.__iter__
    monkeypatch.setattr(
        key_major._Tiles, "__iter__", lambda self: (seen.append(t.units.numel()) or t for t in tiles(self))
    )
    results = []
    for keep in (everything, past):
        layout = BlockLayout.from_mask(keep, **made)
        results.append((block_sparse_attention(q, k, v, layout, causal=True, backend="gather")[0], sum(seen)))
        seen.clear()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("empty", ["width", "value_dim", "queries", "keys"])
def test_nothing_to_attend_to(empty):
    queries, keys, width, dim = (0 if empty == name else n for name, n in
                                 (("queries", 5), ("keys", 8), ("width", 2), ("value_dim", 3)))  # fmt: skip
    q, k, v = torch.randn(2, 3, queries, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, dim)
    indices = torch.zeros(2, 3, queries, width if keys else 0, dtype=torch.int32)
    layout = BlockLayout(indices, torch.zeros(2, 3, queries, dtype=torch.int32), 4, 1, queries, keys)
    out, lse = block_sparse_attention(q, k, v, layout, backend="gather")
    assert out.shape == (2, 3, queries, dim) and (out == 0).all() and (lse == -torch.inf).all()


def test_equal_runs_are_bitwise_equal(schedule):
    (q, k, v, bias), layout, valid = random_case(70, 70, 16, 2, 0, dtype=torch.float32)

    def run():
        out, lse = block_sparse_attention(
            q, k, v, layout, block_bias=bias, causal=True, key_valid=valid, backend="gather"
        )
        return out, lse, *torch.autograd.grad(out.sum(), (q, k, v, bias))

    first = run()
    for _ in range(60):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_gather_gradcheck(schedule):
    inputs, layout, valid = random_case(7, 11, 4, 2, 0, KV_HEADS)

    def run(q, k, v, bias):
        out, lse = block_sparse_attention(
            q, k, v, layout, block_bias=bias, causal=True, key_valid=valid, backend="gather"
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", ["reference", "gather", "flex"])
def test_padding_may_hold_nan(schedule, backend):
    inputs, layout, valid = random_case(33, 33, 8, 4, 0)
    clean = block_sparse_attention(*inputs[:3], layout, causal=True, key_valid=valid, backend=backend)
    q, k, v, _ = (x.detach().clone() for x in inputs)
    k.masked_fill_(~valid[:, None, :, None], torch.nan)
    v.masked_fill_(~valid[:, None, :, None], torch.nan)
    poisoned = [x.requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*poisoned, layout, causal=True, key_valid=valid, backend=backend)
    torch.testing.assert_close((out, lse), clean, rtol=0, atol=0)
    for grad in torch.autograd.grad(out.sum(), poisoned):
        assert grad.isfinite().all()


def test_unlisted_keys_may_hold_nan():
    """Where all pairs would be computed, they are not if a weight of zero could not keep something out."""
    inputs, layout, _ = random_case(64, 64, 8, 1, 0)
    keep = layout.to_mask()
    keep[..., 3] = False
    layout = BlockLayout.from_mask(keep, block_size=8, query_group=1, query_length=64, key_length=64)
    q, k, v = (x.detach() for x in inputs[:3])
    assert what_runs("gather", q, k, v, layout, causal=True) == "gather (masked)"
    clean = block_sparse_attention(q, k, v, layout, causal=True, backend="gather")
    for name in ("k", "v"):
        for value in (torch.nan, torch.inf, -torch.inf):
            given = {"k": k.clone(), "v": v.clone()}
            given[name][:, :, 24:32] = value
            given = [q.clone().requires_grad_(), *(x.requires_grad_() for x in given.values())]
            assert what_runs("gather", *given, layout, causal=True) == "gather (key-major)"
            got = block_sparse_attention(*given, layout, causal=True, backend="gather")
            torch.testing.assert_close(got, clean)
            for grad in torch.autograd.grad(got[0].square().sum(), given):
                bad = (~grad.isfinite()).nonzero()[:, 2]
                assert set(bad.tolist()) <= set(range(24, 32)), "no gradient but the poison's own"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("backend", ["reference", "gather", "flex"])
def test_low_precision_forward(schedule, backend, dtype, tolerance):
    inputs, layout, valid = random_case(300, 300, 16, 16, 0, dtype=dtype)
    q, k, v, bias = (x.detach() for x in inputs)
    got, _ = block_sparse_attention(q, k, v, layout, block_bias=bias, key_valid=valid, backend=backend)
    expected, _ = block_sparse_attention(
        q.double(), k.double(), v.double(), layout, block_bias=bias.double(), key_valid=valid, backend="reference"
    )
    error = (got.double() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("backend", ["reference", "gather", "flex"])
def test_a_bias_that_all_share_changes_nothing(schedule, backend):
    """At 1e6 a float32 log-sum-exp is off by some hundredths: nothing may be divided by its exponential."""
    inputs, layout, valid = random_case(64, 64, 8, 4, 0, dtype=torch.float32)
    plain = torch.zeros_like(inputs[3])
    results = []
    for size in (0.0, -1e6, 1e6):
        bias = (plain + size).requires_grad_()
        out, _ = block_sparse_attention(
            *inputs[:3], layout, block_bias=bias, causal=True, key_valid=valid, backend=backend
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs[:3])))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert (a - b).norm() < 0.05 * b.norm()  # logits are multiples of 1/16


def test_inputs_are_left_alone_and_empty_slots_not_read(schedule):
    inputs, layout, valid = random_case(127, 127, 8, 1, 0, dtype=torch.float32)
    given = [x.detach().clone() for x in inputs]
    given[3] = given[3].masked_fill(~layout.slots, torch.nan)
    layout = dataclasses.replace(layout, indices=layout.indices.masked_fill(~layout.slots, 10**6))
    before = [x.clone() for x in (*given, layout.indices, layout.counts)]
    leaves = [x.requires_grad_() for x in given]
    out, _ = block_sparse_attention(*leaves[:3], layout, block_bias=leaves[3], key_valid=valid, backend="gather")
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    for now, was in zip((*given, layout.indices, layout.counts), before, strict=True):
        torch.testing.assert_close(now.detach(), was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", ["query-major", "key-major", "masked"])
def test_memory_does_not_grow_with_all_pairs(monkeypatch, way, largest_tensor):
    """Twice as many tokens with lists as long as before: no tensor of either pass is more than twice as large."""
    take(monkeypatch, way)
    monkeypatch.setattr(rules, "FUSED_BYTES", 2**16)
    largest = []
    for length in (2048, 4096):
        g = torch.Generator().manual_seed(0)
        tensors = [torch.randn(1, 2, length, 16, generator=g, requires_grad=True) for _ in range(3)]
        near = torch.arange(length)[:, None] // 16 - torch.arange(length // 16)
        keep = ((near >= 0) & (near < 4)).expand(1, 2, -1, -1)
        layout = BlockLayout.from_mask(keep, block_size=16, query_group=1, query_length=length, key_length=length)
        bias = torch.zeros(layout.indices.shape, requires_grad=True)
        with largest_tensor() as mode:
            out, _ = block_sparse_attention(*tensors, layout, block_bias=bias, causal=True, backend="gather")
            out.sum().backward()
        largest.append(mode.elements)
        assert mode.elements < length * length / 4
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_bias_where_nobody_sees_may_be_anything(backend, value):
    """On listed blocks that lie in the future of every row of their group, or hold padding alone."""
    inputs, layout, _ = random_case(64, 64, 8, 4, 0, dtype=torch.float32)
    valid = torch.ones(BATCH, 64, dtype=torch.bool)
    valid[:, 16:24] = False
    first = layout.indices * 8
    hidden = (first > torch.arange(3, 64, 4)[:, None]) | (first == 16)
    results = []
    for bias in (inputs[3], inputs[3].masked_fill(hidden, value)):
        leaves = [x.detach().requires_grad_() for x in (*inputs[:3], bias)]
        out, lse = block_sparse_attention(
            *leaves[:3], layout, block_bias=leaves[3], causal=True, key_valid=valid, backend=backend
        )
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), leaves)))
    assert hidden[layout.slots].any()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_rows_whose_blocks_are_all_hidden_by_a_bias_get_no_gradient(backend):
    inputs, layout, _ = random_case(64, 64, 8, 4, 0)
    bias = inputs[3].detach().clone()
    bias[:, :, 3] = -torch.inf
    for name in ("reference", backend):
        leaves = [x.detach().requires_grad_() for x in (*inputs[:3], bias)]
        out, lse = block_sparse_attention(*leaves[:3], layout, block_bias=leaves[3], backend=name)
        grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, :, 12:16] == 0).all()


def test_pattern_is_exact(schedule):
    """With value = identity the support of the output is the pattern, without any tolerance."""
    (q, k, _, _), layout, valid = random_case(48, 48, 8, 4, 0)
    eye = torch.eye(48, dtype=torch.float64).expand(BATCH, KV_HEADS, 48, 48)
    out, _ = block_sparse_attention(q, k, eye, layout, causal=True, key_valid=valid)
    pattern = layout.token_mask(causal=True, key_valid=valid)
    assert torch.equal(out > 0, pattern)
    pairs = layout.attended_pairs(causal=True, key_valid=valid)
    assert torch.equal(pairs, pattern.sum((-1, -2)).double())
    dense = valid[:, None, :] & torch.ones(48, 48, dtype=torch.bool).tril()
    expected = pairs / dense.sum((-1, -2))[:, None]
    torch.testing.assert_close(layout.density(causal=True, key_valid=valid), expected)


def test_layout_round_trip():
    keep = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = BlockLayout.from_mask(keep, block_size=4, query_group=3, query_length=15, key_length=26)
    assert torch.equal(layout.to_mask(), keep)
    for b, h, g in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        listed = layout.indices[b, h, g, : layout.counts[b, h, g]]
        assert listed.tolist() == keep[b, h, g].nonzero().flatten().tolist()


def test_errors_name_what_to_change():
    (q, k, v, _), layout, _ = random_case(8, 8, 4, 4, 0)
    with pytest.raises(ValueError, match="layout is for 8 queries and 8 keys, got 8 and 7"):
        block_sparse_attention(q, k[:, :, :7], v[:, :, :7], layout)
    with pytest.raises(ValueError, match="share a dtype"):
        block_sparse_attention(q.float(), k, v, layout)
    wrong = dataclasses.replace(layout, indices=layout.indices + 2)
    with pytest.raises(ValueError, match=r"layout.indices must name blocks 0 to 1"):
        block_sparse_attention(q, k, v, wrong)
    with pytest.raises(ValueError, match=r"layout.counts must be within 0 and the width of the lists"):
        block_sparse_attention(q, k, v, dataclasses.replace(layout, counts=layout.counts + 9))
    with pytest.raises(ValueError, match="block_size must be at least 1 token, got 0"):
        dataclasses.replace(layout, block_size=0)
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        block_sparse_attention(q, k, v, layout, backend="tritn")


def test_select_blocks_fills_the_budget():
    scores = torch.tensor([[[[5.0, 4.0, 3.0, 2.0, 1.0]]]])
    forced = torch.tensor([False, False, False, False, True])
    candidates = torch.tensor([True, False, True, True, True])
    keep = select_blocks(scores, always_kept=forced, candidates=candidates, budget=torch.tensor([[[3]]]))
    assert keep.flatten().tolist() == [True, False, True, False, True]
    everything = select_blocks(scores, always_kept=forced, candidates=candidates, budget=torch.tensor([[[9]]]))
    assert everything.flatten().tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 512])
def test_select_blocks_gives_ties_to_the_lower_block(rows_at_a_time, monkeypatch):
    monkeypatch.setattr(select, "ROWS_AT_A_TIME", rows_at_a_time)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (2, 3, 11, 7), generator=generator).float()
    allowed = torch.rand(2, 1, 11, 7, generator=generator)
    forced, candidates = allowed < 0.3, allowed > 0.2
    candidates[:, :, :5, 4:] = False
    budget = torch.randint(0, 8, (2, 1, 11), generator=generator)
    keep = select_blocks(scores, always_kept=forced, candidates=candidates, budget=budget)
    for b, h, g in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(11)).tolist():
        must = forced[b, 0, g].nonzero().flatten().tolist()
        may = (candidates & ~forced)[b, 0, g].nonzero().flatten().tolist()
        may.sort(key=lambda block, row=scores[b, h, g]: (-float(row[block]), block))
        expected = {*must, *may[: max(0, int(budget[b, 0, g]) - len(must))]}
        assert set(keep[b, h, g].nonzero().flatten().tolist()) == expected


def test_soft_top_k_sums_to_k_and_its_gradient_is_right():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 9, generator=g, dtype=torch.float64, requires_grad=True)
    candidates = torch.rand(3, 4, 9, generator=g) < 0.7
    k = torch.full((3, 4), 2)
    k[0, 0], k[0, 1] = 0, 9  # no choice: no gradient
    p = soft_top_k(scores, k, candidates, 0.5).exp() * candidates
    live = (k > 0) & (k < candidates.sum(-1))
    torch.testing.assert_close(p.sum(-1)[live], k[live].double(), rtol=0, atol=1e-9)
    weight = torch.randn(p.shape, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: (soft_top_k(s, k, candidates, 0.5) * weight).sum(), (scores,), atol=1e-6)
    grad = torch.autograd.grad((soft_top_k(scores, k, candidates, 0.5) * weight).sum(), scores)[0]
    assert (grad[~live] == 0).all() and (grad[~candidates] == 0).all()


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", ["normal", "cauchy", "two hills", "outlier", "steps", "equal"])
def test_soft_top_k_of_scores_however_they_are_spread(shape, spread):
    g = torch.Generator().manual_seed(0)
    normal, uniform = (make(64, 40, generator=g) for make in (torch.randn, torch.rand))
    scores = {
        "normal": normal,
        "cauchy": (3 * (uniform - 0.5)).tan(),
        "two hills": normal + 20 * (uniform > 0.8),
        "outlier": torch.cat([normal[:, 1:], torch.full((64, 1), 50.0)], 1),
        "steps": torch.arange(40.0).flip(0).expand(64, 40),
        "equal": torch.ones(64, 40),
    }[shape] * spread
    k = torch.arange(64) % 39 + 1
    candidates = torch.ones_like(scores, dtype=torch.bool)
    p = soft_top_k(scores, k, candidates, 0.5).double().exp()
    # A step of float32 at 1e6 temperatures is an eighth of one.
    torch.testing.assert_close(p.sum(-1), k.double(), rtol=1e-3, atol=1e-3 if spread < 1e3 else 0.1)


def test_soft_top_k_at_some_blocks_is_what_it_is_there(monkeypatch):
    monkeypatch.setattr("astbench_kernels.selection.SCORES_AT_A_TIME", 64)  # several slabs, cut after their candidates
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 20, 16, generator=g, dtype=torch.float64, requires_grad=True)
    candidates = torch.arange(16) <= torch.arange(20)[:, None] - 2
    k = torch.randint(0, 5, (2, 1, 20), generator=g)
    at = torch.randint(0, 16, (2, 3, 20, 7), generator=g)  # some twice, some no candidates
    weight = torch.randn(at.shape, generator=g, dtype=torch.float64)
    everywhere = candidates.expand(scores.shape)
    whole = soft_top_k(scores, k.expand(2, 3, 20), everywhere, 0.5)
    some = soft_top_k(scores, k.expand(2, 3, 20), everywhere, 0.5, at=at)
    torch.testing.assert_close(some, whole.gather(-1, at), rtol=0, atol=0)
    expected = torch.autograd.grad((whole.gather(-1, at) * weight).sum(), scores)[0]
    torch.testing.assert_close(torch.autograd.grad((some * weight).sum(), scores)[0], expected)
    live = (k.expand(2, 3, 20) > 0) & (k.expand(2, 3, 20) < everywhere.sum(-1))
    p = whole.exp() * everywhere
    torch.testing.assert_close(p.sum(-1)[live], k.expand(2, 3, 20)[live].double(), rtol=0, atol=1e-9)


def test_log_mass_is_the_logsumexp_and_so_is_its_gradient(monkeypatch):
    monkeypatch.setattr("astbench_kernels.selection.SCORES_AT_A_TIME", 50)
    g = torch.Generator().manual_seed(0)
    scores = (30 * torch.randn(2, 3, 9, 11, generator=g, dtype=torch.float64)).requires_grad_()
    blocks = (torch.rand(2, 3, 9, 11, generator=g) < 0.4) & (torch.arange(11) <= torch.arange(9)[:, None])
    sizes = torch.rand(2, 11, generator=g, dtype=torch.float64)
    got = log_mass(scores, blocks, sizes)
    masked = (scores + sizes[:, None, None]).masked_fill(~blocks, -torch.inf)
    some = blocks.any(-1)
    assert some.any() and not some.all() and (got[~some] == -torch.inf).all()
    torch.testing.assert_close(got[some], masked.logsumexp(-1)[some])
    weight = torch.randn(some.shape, generator=g, dtype=torch.float64)
    expected = torch.autograd.grad((masked.logsumexp(-1)[some] * weight[some]).sum(), scores)[0]
    torch.testing.assert_close(torch.autograd.grad(got, scores, weight)[0], expected)


@pytest.mark.parametrize("at", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e30])
def test_soft_top_k_where_nothing_is_soft_stays_finite(at, scale):
    scores = (torch.tensor([[100.0, 0, 0, 0, 0, 0], [0, 1, 0, 2, 0, 300]]) * scale).requires_grad_()
    places = torch.tensor([[0, 1], [5, 2]]) if at else None
    log_p = soft_top_k(scores, torch.tensor(1), torch.ones(2, 6, dtype=torch.bool), 0.05, at=places)
    (grad,) = torch.autograd.grad(100 * log_p.clamp(min=-1e9).sum(), scores)
    assert not log_p.isnan().any() and grad.isfinite().all()


def test_soft_top_k_of_nothing():
    scores, candidates = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    assert soft_top_k(scores, torch.tensor(2), candidates, 0.5, at=torch.zeros(3, 0, dtype=torch.long)).shape == (3, 0)
    assert soft_top_k(scores[:, :0], torch.tensor(2), candidates[:, :0], 0.5).shape == (3, 0)
