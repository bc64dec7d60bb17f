"""Packed sequences: each as if it were alone, on every backend, gradients included; what does not fit is refused."""

import re
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import astbench_kernels.varlen as packed
from astbench_kernels import BlockLayout, block_sparse_attention, block_sparse_attention_varlen
from tests.kernels.conftest import DEVICE

TRITON = pytest.mark.skipif(
    find_spec("triton") is None
    or (DEVICE == "cpu" and version("triton") < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"),
    reason="triton is not installed, or its interpreter needs numpy below 2.4",
)
HEADS, KV_HEADS, DIM, VALUE_DIM, SIZE = 4, 2, 16, 16, 16
LENGTHS = (37, 1, 0, 64, 20)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def draw(queries, keys, dtype, causal, group):
    """Packed tensors, a random layout for the longest, with a bias."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(sum(queries), HEADS, DIM, generator=g, dtype=dtype)
    k = torch.randn(sum(keys), KV_HEADS, DIM, generator=g, dtype=dtype)
    v = torch.randn(sum(keys), KV_HEADS, VALUE_DIM, generator=g, dtype=dtype)
    groups, blocks = -(-max(queries) // group), -(-max(keys) // SIZE)
    keep = torch.rand(len(queries), HEADS, groups, blocks, generator=g) < 0.5
    if causal:
        keep &= torch.arange(blocks) * SIZE <= (torch.arange(groups)[:, None] + 1) * group - 1
    layout = BlockLayout.from_mask(
        keep, block_size=SIZE, query_group=group, query_length=max(queries), key_length=max(keys)
    )
    bias = torch.randn(layout.indices.shape, generator=g, dtype=dtype)
    layout = replace(layout, indices=layout.indices.to(DEVICE), counts=layout.counts.to(DEVICE))
    return [x.to(DEVICE).requires_grad_() for x in (q, k, v, bias)], layout


def alone(tensors, layout, queries, keys, causal):
    """Sequence by sequence on the reference."""
    q, k, v, bias = tensors
    outs, lses = [], []
    for i, (a, b) in enumerate(zip(q.split(queries), zip(k.split(keys), v.split(keys), strict=True), strict=True)):
        if not len(a):
            continue
        groups, blocks = -(-len(a) // layout.query_group), -(-len(b[0]) // SIZE)
        keep = layout.to_mask()[i : i + 1, :, :groups, :blocks]
        own = BlockLayout.from_mask(
            keep, block_size=SIZE, query_group=layout.query_group, query_length=len(a), key_length=len(b[0])
        )
        # The bias of each kept block, in the order of the own lists.
        of_block = bias.new_zeros(*layout.slots.shape[:3], layout.num_blocks + 1)
        listed = layout.indices.long().masked_fill(~layout.slots, layout.num_blocks)
        of_block = of_block.scatter(-1, listed, bias)[i : i + 1, :, :groups]
        out, lse = block_sparse_attention(
            *(x.transpose(0, 1)[None] for x in (a, *b)),
            own,
            block_bias=of_block.gather(-1, own.indices.long()),
            causal=causal,
            backend="reference",
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize(("causal", "group"), [(True, 1), (True, 16), (False, 16)])
def test_each_sequence_is_as_if_alone(backend, causal, group):
    dtype = torch.float32 if backend == "triton" else torch.float64
    tensors, layout = draw(LENGTHS, LENGTHS, dtype, causal, group)
    at = offsets(LENGTHS)
    *inputs, bias = tensors
    got = block_sparse_attention_varlen(*inputs, layout, at, at, block_bias=bias, causal=causal, backend=backend)
    wanted = alone(tensors, layout, LENGTHS, LENGTHS, causal)
    close = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {}
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **close)
    grad = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1), dtype=dtype).to(DEVICE)
    for a, b in zip(
        torch.autograd.grad(got[0], tensors, grad), torch.autograd.grad(wanted[0], tensors, grad), strict=True
    ):
        torch.testing.assert_close(a, b, **close)


def test_keys_of_other_sequences_than_the_queries():
    queries, keys = (5, 33, 2), (40, 3, 17)
    tensors, layout = draw(queries, keys, torch.float64, False, 16)
    *inputs, bias = tensors
    got = block_sparse_attention_varlen(*inputs, layout, offsets(queries), offsets(keys), block_bias=bias)
    for a, b in zip(got, alone(tensors, layout, queries, keys, False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("lists", [1, KV_HEADS])
@pytest.mark.parametrize("lengths", [(0, 21, 0), (33,), (5, 33, 2)])
def test_shared_lists_and_what_the_neighbours_hold(backend, lists, lengths):
    tensors, layout = draw(lengths, lengths, torch.float64, True, 16)
    layout = replace(layout, indices=layout.indices[:, :lists], counts=layout.counts[:, :lists])
    q, k, v, _ = (x.detach() for x in tensors)
    at = offsets(lengths).long()
    clean = block_sparse_attention_varlen(q, k, v, layout, at, at, causal=True, backend=backend)
    stop = int(at[-2])  # all but the last sequence, and its neighbour holds nothing good
    k[stop:], v[stop:] = torch.nan, torch.inf
    dirty = block_sparse_attention_varlen(q, k, v, layout, at, at, causal=True, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:stop], b[:stop])


@pytest.mark.parametrize("empty", ["queries", "keys", "both"])
def test_nothing_at_all(empty):
    queries, keys = (
        ((0, 0), (0, 0)) if empty == "both" else ((0, 0), (3, 2)) if empty == "queries" else ((3, 2), (0, 0))
    )
    layout = BlockLayout.from_mask(
        torch.zeros(2, 1, -(-max(queries) // 16), -(-max(keys) // SIZE), dtype=torch.bool),
        block_size=SIZE,
        query_group=16,
        query_length=max(queries),
        key_length=max(keys),
    )
    q, k = torch.randn(sum(queries), HEADS, DIM), torch.randn(sum(keys), KV_HEADS, DIM)
    at = [offsets(x).cpu() for x in (queries, keys)]
    out, lse = block_sparse_attention_varlen(q, k, k, layout, *at, backend="gather")
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_rows_that_do_not_exist_are_not_computed(monkeypatch):
    seen = []

    def spying(q, k, v, layout, **rest):
        seen.append(layout)
        return block_sparse_attention(q, k, v, layout, **rest)

    monkeypatch.setattr(packed, "block_sparse_attention", spying)
    (q, k, v, _), layout = draw(LENGTHS, LENGTHS, torch.float64, True, 16)
    block_sparse_attention_varlen(q, k, v, layout, offsets(LENGTHS), offsets(LENGTHS), causal=True)
    kept = seen[0].counts
    for i, length in enumerate(LENGTHS):
        groups = -(-length // 16)
        assert torch.equal(kept[i, :, :groups], layout.counts[i, :, :groups])
        assert not kept[i, :, groups:].any()


def test_what_does_not_fit_is_refused():
    (q, k, v, _), layout = draw((8, 20), (8, 20), torch.float64, False, 16)
    good = offsets((8, 20))

    def call(a=good, b=good, q=q, v=v, layout=layout):
        return block_sparse_attention_varlen(q, k, v, layout, a, b)

    call()
    for change, said in (
        (
            {"a": torch.tensor([0.0, 28.0])},
            "cu_seqlens_q must be an integer tensor (sequences + 1,), got torch.float",
        ),
        ({"a": [0, 8, 28]}, "cu_seqlens_q must be an integer tensor (sequences + 1,), got list"),
        ({"b": torch.tensor([[0, 28]])}, "cu_seqlens_k must be an integer tensor"),
        ({"b": torch.tensor([False, True])}, "cu_seqlens_k must be an integer tensor"),
        ({"a": torch.tensor([0, 8, 27])}, "cu_seqlens_q goes from 0 to 27, must go from 0 to the 28 queries"),
        ({"a": torch.tensor([1, 8, 28])}, "cu_seqlens_q goes from 1 to 28"),
        ({"b": torch.tensor([0, 30, 28])}, "cu_seqlens_k falls behind entry 1"),
        ({"q": q[None]}, "the queries must be (total, heads, dim), got (1, 28"),
        ({"b": torch.tensor([0, 12, 28])}, "the layout is for 20 keys, the longest sequence of cu_seqlens_k has 16"),
        ({"a": torch.tensor([0, 20, 28, 28])}, "cu_seqlens_q tells of 3 sequences, cu_seqlens_k of 2, the layout of 2"),
        ({"a": torch.tensor([0, 8, 28, 28]), "b": torch.tensor([0, 20, 28, 28])}, "the layout of 2"),
        ({"v": v[:-1]}, "k and v differ"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call(**change)
    coarse = BlockLayout(layout.indices, layout.counts, SIZE, 16, 20, 20, key_stride=2)
    with pytest.raises(ValueError, match="key_stride of 1"):
        call(layout=coarse)
