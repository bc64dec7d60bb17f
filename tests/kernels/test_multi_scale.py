"""Coarse keys beside fine ones in one softmax, against the dense definition in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from astbench_kernels import BlockLayout, block_sparse_attention, merge_attention
from astbench_kernels.backends.cpu import key_major
from astbench_kernels.backends.cpu import query_major as gather
from astbench_kernels.layout import visible_pairs

# Distinct primes, so that a swapped axis cannot pass.
BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 6, 3, 5, 7


@dataclass(frozen=True)
class Case:
    queries: int
    offset: int
    group: int
    stride: int
    causal: bool = True
    padding: bool = False
    lists: int = HEADS

    @property
    def tokens(self):
        return self.offset + self.queries

    @property
    def coarse(self):
        """The last coarse key may be short of tokens: bidirectional rows see it, causal ones never."""
        return -(-self.tokens // self.stride)


CASES = {
    "stride1-per-token": Case(29, 0, 1, 1),
    "stride2-groups-of-3": Case(41, 0, 3, 2, padding=True, lists=KV_HEADS),
    "stride4-per-token": Case(61, 0, 1, 4, padding=True),
    "stride4-groups-of-8": Case(53, 0, 8, 4, lists=1),
    "stride7-groups-of-4": Case(67, 0, 4, 7, padding=True),
    "stride7-all-rows": Case(31, 0, 64, 7, lists=KV_HEADS),
    "stride2-bidirectional": Case(37, 0, 4, 2, causal=False, padding=True),
    "stride7-bidirectional-per-token": Case(43, 0, 1, 7, causal=False, lists=1),
    "stride4-decode-where-a-key-ends": Case(1, 59, 1, 4, padding=True),
    "stride4-decode-a-token-before": Case(1, 58, 1, 4, lists=KV_HEADS),
    "stride7-chunk-from-mid-group": Case(11, 47, 4, 7, padding=True),
}


@pytest.fixture(params=["reference", "flex", "query-major", "key-major", "masked"])
def backend(request, monkeypatch):
    """Those that run anywhere; every way of the gather backend, whatever the shape."""
    if request.param in ("reference", "flex"):
        return request.param
    monkeypatch.setattr(gather, "schedule_of", lambda *args, **kwargs: request.param.replace("-", "_"))
    monkeypatch.setattr(key_major, "TILE_ROWS", 50)
    return "gather"


def random_layout(case, keys, block_size, stride, generator):
    groups = (case.tokens - 1) // case.group - case.offset // case.group + 1
    keep = torch.rand(BATCH, case.lists, groups, -(-keys // block_size), generator=generator) < 0.6
    return BlockLayout.from_mask(
        keep, block_size=block_size, query_group=case.group, query_length=case.queries, key_length=keys,
        query_offset=case.offset, key_stride=stride,
    )  # fmt: skip


def random_case(case, seed=0):
    """Leaves by name, and (layout, key_valid) of the fine and of the coarse keys."""
    g = torch.Generator().manual_seed(seed)
    fine = random_layout(case, case.tokens, 8, 1, g)
    coarse = random_layout(case, case.coarse, 4, case.stride, g)
    shapes = {
        "q": (BATCH, HEADS, case.queries, DIM),
        "k": (BATCH, KV_HEADS, case.tokens, DIM),
        "v": (BATCH, KV_HEADS, case.tokens, VALUE_DIM),
        "bias": fine.indices.shape,
        "coarse_k": (BATCH, KV_HEADS, case.coarse, DIM),
        "coarse_v": (BATCH, KV_HEADS, case.coarse, VALUE_DIM),
        "coarse_bias": coarse.indices.shape,
    }
    leaves = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    valid = [
        torch.rand(BATCH, keys, generator=g) < 0.8 if case.padding else None for keys in (case.tokens, case.coarse)
    ]
    return leaves, (fine, valid[0]), (coarse, valid[1])


def stands_for(key, stride):
    """The tokens of a key."""
    return range(key * stride, key * stride + stride)


def visible(layout, causal, valid):
    """Bool `(batch, heads, queries, keys)` pair by pair: listed, there, and no token of the key in the future."""
    keep = layout.to_mask().repeat_interleave(HEADS // layout.indices.shape[1], 1)
    pairs = torch.zeros(BATCH, HEADS, layout.query_length, layout.key_length, dtype=torch.bool)
    for row in range(layout.query_length):
        position = row + layout.query_offset
        group = position // layout.query_group - layout.first_group
        for key in range(layout.key_length):
            if not causal or all(token <= position for token in stands_for(key, layout.key_stride)):
                pairs[:, :, row, key] = keep[:, :, group, key // layout.block_size]
    return pairs if valid is None else pairs & valid[:, None, None]


def bias_of_pairs(bias, layout):
    """`(batch, heads, queries, keys)`: the bias of each key's block in each row's list."""
    table = torch.zeros(*bias.shape[:3], layout.num_blocks, dtype=bias.dtype)
    for b, h, group in torch.cartesian_prod(*(torch.arange(n) for n in bias.shape[:3])).tolist():
        count = int(layout.counts[b, h, group])
        table[b, h, group, layout.indices[b, h, group, :count].long()] = bias[b, h, group, :count]
    per_key = table[:, :, layout.row_groups()][..., torch.arange(layout.key_length) // layout.block_size]
    return per_key.repeat_interleave(HEADS // bias.shape[1], 1)


def definition(leaves, fine, coarse, case):
    """All keys in one softmax, coarse ones with their block's bias and log(stride)."""
    logits, values, pairs = [], [], []
    for prefix, (layout, valid), extra in (("", fine, 0.0), ("coarse_", coarse, math.log(case.stride))):
        k, v = (leaves[prefix + x].repeat_interleave(HEADS // KV_HEADS, 1) for x in "kv")
        bias = bias_of_pairs(leaves[prefix + "bias"], layout)
        logits.append(leaves["q"] @ k.transpose(-1, -2) * DIM**-0.5 + bias + extra)
        values.append(v)
        pairs.append(visible(layout, case.causal, valid))
    seen = torch.cat(pairs, -1)
    logits = torch.cat(logits, -1).masked_fill(~seen, -torch.inf)
    nothing = ~seen.any(-1, keepdim=True)
    weights = logits.masked_fill(nothing, 0.0).softmax(-1) * seen
    lse = logits.masked_fill(nothing, 0.0).logsumexp(-1).masked_fill(nothing.squeeze(-1), -torch.inf)
    return weights @ torch.cat(values, 2), lse


def two_calls(leaves, fine, coarse, case, backend):
    """What the kernels do of it."""
    parts = []
    for prefix, (layout, valid), extra in (("", fine, 0.0), ("coarse_", coarse, math.log(case.stride))):
        out, lse = block_sparse_attention(
            leaves["q"], leaves[prefix + "k"], leaves[prefix + "v"], layout, block_bias=leaves[prefix + "bias"],
            causal=case.causal, key_valid=valid, backend=backend,
        )  # fmt: skip
        parts.append((out, lse + extra))
    return merge_attention(parts)


def with_gradients(run, leaves, *args):
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    out, lse = run(leaves, *args)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g, dtype=out.dtype)).sum()
    loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * torch.randn(lse.shape, generator=g, dtype=out.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients(backend, case):
    leaves, fine, coarse = random_case(case)
    expected = with_gradients(definition, leaves, fine, coarse, case)
    got = with_gradients(two_calls, leaves, fine, coarse, case, backend)
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_cases_hold_rows_that_see_no_coarse_key_and_rows_that_see_nothing():
    leaves, fine, coarse = random_case(CASES["stride7-groups-of-4"])
    coarse_pairs = visible(coarse[0], True, coarse[1])
    assert not coarse_pairs[:, :, :6].any() and coarse_pairs[:, :, 6].any(), "key 0 stands at position 6"
    _, lse = definition(leaves, fine, coarse, CASES["stride7-groups-of-4"])
    assert (lse == -torch.inf).any()


@pytest.mark.parametrize("stride", [1, 2, 4, 7])
@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_pattern_and_its_counts_are_exact(backend, stride, offset, causal):
    """With value = identity the support of the output is the pattern, without any tolerance."""
    case = Case(23, offset, 3, stride, causal, padding=True)
    leaves, _, (layout, valid) = random_case(case)
    eye = torch.eye(case.coarse, dtype=torch.float64).expand(BATCH, KV_HEADS, -1, -1)
    out, _ = block_sparse_attention(
        leaves["q"], leaves["coarse_k"], eye, layout, causal=causal, key_valid=valid, backend=backend
    )
    pattern = visible(layout, causal, valid)
    assert torch.equal(out > 0, pattern)
    assert torch.equal(layout.token_mask(causal=causal, key_valid=valid), pattern)
    pairs = layout.attended_pairs(causal=causal, key_valid=valid)
    assert torch.equal(pairs, pattern.sum((-1, -2)).double())
    full = replace(layout, indices=torch.arange(layout.num_blocks).int().expand(*layout.counts.shape, -1))
    full = replace(full, counts=torch.full_like(layout.counts, layout.num_blocks))
    for there in (valid, None):
        everything = visible(full, causal, there)[:, 0].sum((-1, -2)).double()
        got = visible_pairs(
            case.queries, case.coarse, causal=causal, query_offset=offset, key_valid=there, batch=BATCH,
            device=torch.device("cpu"), key_stride=stride,
        )  # fmt: skip
        assert torch.equal(got, everything)
        density = layout.attended_pairs(causal=causal, key_valid=there) / everything[:, None]
        torch.testing.assert_close(layout.density(causal=causal, key_valid=there), density, rtol=0, atol=0)


@pytest.mark.parametrize("stride", [2, 4, 7])
def test_a_coarse_key_weighs_what_it_stands_for(backend, stride):
    """Where all tokens of a coarse key are alike, attending to it is attending to them."""
    case = Case(28, 5 * stride, 1, stride)  # 28: no coarse key is short of tokens
    leaves, _, (layout, _) = random_case(case)
    k, v, bias = (leaves[name] for name in ("coarse_k", "coarse_v", "coarse_bias"))
    out, lse = block_sparse_attention(leaves["q"], k, v, layout, block_bias=bias, backend=backend)
    out, lse = merge_attention([(out, lse + math.log(stride))])
    tokens = replace(layout, block_size=layout.block_size * stride, key_length=case.tokens, key_stride=1)
    k, v = (x.repeat_interleave(stride, 2) for x in (k, v))
    expected = block_sparse_attention(leaves["q"], k, v, tokens, block_bias=bias, backend="reference")
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["stride2-groups-of-3", "stride4-per-token", "stride7-groups-of-4"])
def test_the_future_does_not_move_the_past(backend, name):
    """Coarse keys are pooled from the tokens, those that hold future tokens too."""
    case = CASES[name]
    leaves, fine, coarse = random_case(case)

    def run(k, v):
        pooled = {}
        for name, x in (("coarse_k", k), ("coarse_v", v)):
            whole = torch.nn.functional.pad(x, (0, 0, 0, case.coarse * case.stride - case.tokens))
            pooled[name] = whole.unflatten(2, (case.coarse, case.stride)).mean(3)
        return two_calls({**leaves, "k": k, "v": v, **pooled}, fine, coarse, case, backend)

    before = run(leaves["k"], leaves["v"])
    for cut in (1, case.stride - 1, case.stride, case.stride + 1, 5 * case.stride - 1, 5 * case.stride):
        k, v = leaves["k"].clone(), leaves["v"].clone()
        k[:, :, cut:] += 3.0
        v[:, :, cut:] -= 5.0
        after = run(k, v)
        for x, y in zip(before, after, strict=True):
            torch.testing.assert_close(x[:, :, :cut], y[:, :, :cut], rtol=0, atol=1e-12)
        assert not torch.allclose(before[0][:, :, cut:], after[0][:, :, cut:])


def test_what_nobody_may_see_may_hold_nan(backend):
    """Invalid keys on both sides, and coarse ones in blocks that no list names."""
    case = CASES["stride4-per-token"]
    leaves, fine, (layout, valid) = random_case(case)
    keep = layout.to_mask()
    keep[..., -1] = False
    layout = BlockLayout.from_mask(
        keep, block_size=4, query_group=1, query_length=case.queries, key_length=case.coarse, key_stride=case.stride
    )
    leaves["coarse_bias"] = torch.randn(layout.indices.shape, dtype=torch.float64)
    clean = with_gradients(two_calls, leaves, fine, (layout, valid), case, backend)
    poisoned = dict(leaves)
    for name, there in (("k", fine[1]), ("v", fine[1]), ("coarse_k", valid), ("coarse_v", valid)):
        poisoned[name] = leaves[name].masked_fill(~there[:, None, :, None], torch.nan)
    if backend == "gather" and gather.schedule_of() != "masked":  # which reads listed blocks only
        for name in ("coarse_k", "coarse_v"):
            poisoned[name][:, :, (layout.num_blocks - 1) * 4 :] = torch.nan
    got = with_gradients(two_calls, poisoned, fine, (layout, valid), case, backend)
    for name, value in got.items():
        torch.testing.assert_close(value, clean[name], rtol=0, atol=0)


def test_layout_keeps_its_stride():
    _, _, (layout, _) = random_case(CASES["stride7-all-rows"])
    assert layout.key_stride == 7 and layout.expand_heads(HEADS).key_stride == 7
    with pytest.raises(ValueError, match="key_stride must be at least 1 token, got 0"):
        replace(layout, key_stride=0)


# ----- merging


def random_parts(count, generator, nothing=0.0, dtype=torch.float64):
    """Parts as attention returns them: zero with log-sum-exp -inf in rows that saw nothing."""
    parts = []
    for _ in range(count):
        empty = torch.rand(2, 3, 5, generator=generator) < nothing
        out = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
        lse = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 4
        parts.append((out.masked_fill(empty.unsqueeze(-1), 0).to(dtype), lse.masked_fill(empty, -torch.inf)))
    return parts


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merge_gradcheck(count):
    leaves = [x.requires_grad_() for part in random_parts(count, torch.Generator().manual_seed(0)) for x in part]
    assert torch.autograd.gradcheck(lambda *x: merge_attention(list(zip(x[::2], x[1::2], strict=True))), leaves)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merge_of_rows_that_saw_nothing(count):
    """They weigh nothing, get no gradient and make no NaN, whatever gradient comes in."""
    parts = random_parts(count, torch.Generator().manual_seed(0), nothing=0.5)
    leaves = [x.requires_grad_() for part in parts for x in part]
    out, lse = merge_attention(parts)
    empty = torch.stack([part[1] for part in parts]) == -torch.inf
    assert empty.all(0).any() and not empty.all(), "the case must hold both"
    assert (out[empty.all(0)] == 0).all() and torch.equal(lse == -torch.inf, empty.all(0))
    for index in (~empty.all(0)).nonzero().tolist():
        known = [(o[tuple(index)], x[tuple(index)]) for o, x in parts if x[tuple(index)] > -torch.inf]
        weights = torch.stack([x for _, x in known]).softmax(0)
        expected = sum(w * o for w, (o, _) in zip(weights, known, strict=True))
        torch.testing.assert_close(out[tuple(index)], expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    for nth, (d_out, d_lse) in enumerate(zip(grads[::2], grads[1::2], strict=True)):
        assert d_out.isfinite().all() and d_lse.isfinite().all()
        assert (d_out[empty[nth]] == 0).all() and (d_lse[empty[nth]] == 0).all()
        assert (d_lse[~empty[nth]] != 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_merge_dtypes(dtype, tolerance):
    """Only the inputs and the result are rounded; log-sum-exps lie as far apart as they like."""
    g = torch.Generator().manual_seed(0)
    parts = [(out, (lse * 100).float()) for out, lse in random_parts(3, g, nothing=0.3, dtype=dtype)]
    out, lse = merge_attention(parts)
    expected, expected_lse = merge_attention([(o.double(), x.double()) for o, x in parts])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out.double() - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_no_copy_of_an_output_for_its_backward_pass(dtype):
    parts = random_parts(3, torch.Generator().manual_seed(0), dtype=dtype)
    leaves = [x.requires_grad_() for part in parts for x in part]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        merge_attention(parts)
    large = {x.data_ptr() for x in saved if x.numel() == parts[0][0].numel()}
    assert large == {x.data_ptr() for x in leaves[::2]}


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="one or more"):
        merge_attention([])
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 7\).*\(2, 3, 4\)"):
        merge_attention([(out, lse), (out, lse[..., :4])])
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 6\)"):
        merge_attention([(out, lse), (out[..., :6], lse)])
