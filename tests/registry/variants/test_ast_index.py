"""AST's index of tokens: the best projections of a rank, the scores made of them, and where calibration puts them."""

import pytest
import torch

from astbench import swap_attention
from astbench_registry.interface import AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.registry import build_attention
from astbench_registry.variants.ast.index import TokenIndex
from tests.astbench.conftest import VOCABULARY, tiny_model

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=8, layer_index=0, num_layers=1)


def observed(dim, seed=0, keys=200):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, 8, 8, generator=g, dtype=torch.float64)
    q = torch.randn(3, 4, 50, 8, generator=g, dtype=torch.float64) @ mix[0]
    k = torch.randn(3, 2, keys, 8, generator=g, dtype=torch.float64) @ mix[1] + 3
    torch.manual_seed(1)
    index = TokenIndex(SHAPE, dim).double()
    for row in range(3):
        index.observe(q[row : row + 1], k[row : row + 1], None, None)
    return index, q, k


def error(q, k, a, b):
    """Mean square of what is left of q . k, keys centred, when q A . k B is taken away; of each query head's group."""
    k = k - k.mean((0, 2), keepdim=True)
    whole = k.repeat_interleave(2, 1)
    left = q @ whole.mT - (q @ a) @ (whole @ b.repeat_interleave(2, 0)).mT
    return float(left.square().mean())


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_it_starts_from_the_best_projections_of_its_rank(dim):
    index, q, k = observed(dim)
    with torch.no_grad():
        before = error(q, k, index.query_weight, index.key_weight)
        assert index.start()
        least = error(q, k, index.query_weight, index.key_weight)
        assert least < before
        if dim == 8:
            assert least < 1e-18
        g = torch.Generator().manual_seed(2)
        for _ in range(20):  # nothing near it is better, heads of a group alike
            near = (index.query_weight[::2], index.key_weight)
            a, b = (x + 0.01 * torch.randn(2, 8, dim, generator=g).double() for x in near)
            assert error(q, k, a.repeat_interleave(2, 0), b) > least


def test_padding_is_not_observed():
    index, q, k = observed(3)
    index.start()
    other = TokenIndex(SHAPE, 3).double()
    for row in range(3):
        rubbish = torch.full((1, 4, 7, 8), torch.nan, dtype=torch.float64)
        real = [torch.arange(n + 7)[None] < n for n in (50, 200)]
        other.observe(
            torch.cat([q[row : row + 1], rubbish], 2), torch.cat([k[row : row + 1], rubbish[:, :2]], 2), *real
        )
    other.start()
    torch.testing.assert_close(other.key_weight.abs(), index.key_weight.abs(), rtol=1e-6, atol=1e-6)


def test_more_dimensions_than_a_head_has_are_refused():
    with pytest.raises(ValueError, match=r"--attention\.index_dim must be at most the heads' size, 8, got 9"):
        build_attention("ast", {"index_dim": 9}, SHAPE)


def test_nothing_observed_nothing_started():
    index = TokenIndex(SHAPE, 3)
    before = index.key_weight.clone()
    assert not index.start()
    assert torch.equal(index.key_weight, before)


def test_of_all_dimensions_its_scores_are_the_blocks_true_masses():
    options = {"block_size": 4, "min_blocks": 1, "density": 0.3, "sink_block": False}
    index = build_attention("ast", {**options, "index_dim": 8}, SHAPE).eval().double()
    oracle = build_attention("oracle_topk", options, SHAPE).eval().double()
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 61, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    mask = AttentionMask("causal_self")
    index.observe(q, k, mask)
    assert index.start()
    torch.testing.assert_close(index(q, k, v, mask).out, oracle(q, k, v, mask).out)


def test_a_model_that_is_calibrated_runs_dense_meanwhile():
    model = tiny_model("llama")
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids).logits
        handle = swap_attention(model, "ast", {"index_dim": 2, "block_size": 4, "top_k": 4, "sink_block": False})
        before = [p.clone() for p in handle.parameters()]
        untrained = model(ids).logits
        with handle.calibrating():
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
        calibrated = model(ids).logits
    assert (calibrated - dense).abs().mean() < (untrained - dense).abs().mean()
    assert not any(torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True) if p.dim() > 1)
    assert handle.notes[-1] == "3 of 3 layers start from the model's own queries and keys"


def test_a_calibration_that_fails_starts_nothing_then_or_later():
    model = tiny_model("llama")
    handle = swap_attention(model, "ast", {"index_dim": 2, "block_size": 4})
    before = [p.clone() for p in handle.parameters()]
    with pytest.raises(KeyError), torch.no_grad(), handle.calibrating():
        model(torch.ones(1, 9, dtype=torch.long))
        raise KeyError
    with handle.calibrating():
        pass
    assert handle.notes[-1] == "0 of 3 layers start from the model's own queries and keys"
    assert all(torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True))


def test_variants_that_do_not_look_are_left_alone():
    model = tiny_model("llama")
    handle = swap_attention(model, "local", {"window": 4})
    with handle.calibrating(), torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
    assert handle.notes[-1] == "0 of 3 layers start from the model's own queries and keys"
