"""`nsa` and `dsa` against the plain references that flash-linear-attention ships beside its kernels (fla-core)."""

import warnings

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention

with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    warnings.simplefilter("ignore")  # without a GPU it says that there is none
    patch.setenv("TRITON_INTERPRET", "1")  # it imports Triton's kernels too, which other tests have interpreted
    naive_nsa = pytest.importorskip("fla.ops.nsa.naive", reason="fla-core is not installed")
    naive_dsa = pytest.importorskip("fla.ops.dsa.naive", reason="fla-core is not installed")

BATCH, HEADS, KV_HEADS, DIM, HIDDEN = 2, 6, 3, 16, 24
CAUSAL = AttentionMask("causal_self")


def draw(tokens):
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(BATCH, n, tokens, DIM, generator=g) for n in (HEADS, KV_HEADS, KV_HEADS))
    return q * 2, k, v, torch.randn(BATCH, tokens, HIDDEN, generator=g)


def by_tokens(x):
    """(batch, heads, tokens, d), as both sides have it in turn."""
    return x.transpose(1, 2)


@pytest.mark.parametrize(("tokens", "top_k"), [(64, 4), (77, 5), (13, 4)])
def test_nsa(tokens, top_k):
    """Compression and selection with one block size, as there, and gates of our own; its window is flash-attn's."""
    size = 8
    options = {"block_size": size, "top_k": top_k, "compress_size": size, "compress_stride": size, "window": 2}
    module = build_attention("nsa", options, AttentionShape(HEADS, KV_HEADS, DIM, hidden_size=HIDDEN)).eval()
    torch.nn.init.normal_(module.gate.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.gate.bias.view(HEADS, 3)[:, 2] = -1e9  # no window
        q, k, v, hidden = draw(tokens)
        got = module(q, k, v, CAUSAL, context=AttentionContext(hidden_states=hidden)).out
        gates = module._gates(hidden, CAUSAL)
    scale, queries = DIM**-0.5, by_tokens(q)
    means = [torch.stack([part.mean(2) for part in x.split(size, 2)], 1) for x in (k, v)]  # (batch, blocks, heads, d)
    compressed, _ = naive_nsa.naive_nsa_compression(queries, *means, size, scale)
    blocks = naive_nsa.naive_nsa_topk(queries, means[0], top_k, size, scale)
    selected = naive_nsa.naive_nsa_selection(queries, by_tokens(k), by_tokens(v), blocks, size, scale)
    expected = gates[..., 0:1] * by_tokens(compressed) + gates[..., 1:2] * by_tokens(selected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "top_k"), [(64, 9), (50, 1), (20, 30)])
def test_dsa(tokens, top_k):
    options = {"top_k": top_k, "index_heads": 8, "index_dim": 4}
    module = build_attention("dsa", options, AttentionShape(HEADS, KV_HEADS, DIM, hidden_size=HIDDEN)).eval()
    q, k, v, hidden = draw(tokens)
    with torch.no_grad():
        # Positive weights and eight heads: no two tokens tie at zero, where either side might take the other one.
        module.index_weight.weight.abs_()
        hidden = hidden.abs() * torch.linspace(-1, 1, HIDDEN).sign()
        module.index_weight.weight.mul_(torch.linspace(-1, 1, HIDDEN).sign())
        got = module(q, k, v, CAUSAL, context=AttentionContext(hidden_states=hidden)).out
        indexed = module.index_query(hidden).unflatten(-1, (8, 4)), module.index_key(hidden)
        weights = module.index_weight(hidden)
        assert (weights > 0).all()
    expected = naive_dsa.naive_dsa(*(by_tokens(x) for x in (q, k, v)), *indexed, weights, topk=top_k)
    torch.testing.assert_close(got, by_tokens(expected), rtol=1e-4, atol=1e-5)
