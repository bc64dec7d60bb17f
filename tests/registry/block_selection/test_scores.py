"""Scores of blocks with several rows each: every way of computing them against products written out."""

import pytest
import torch

from astbench_registry.block_selection import block_scores, scores
from astbench_registry.block_selection.scores import KEYS, _in_pieces
from astbench_registry.registry import make_config


def factors(groups, blocks, parts, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(groups)
    query = torch.randn(2, 6, groups, 5, generator=g, dtype=torch.float64) * 3
    key = torch.randn(2, 3, blocks * parts, 5, generator=g, dtype=torch.float64)
    return query.to(dtype).requires_grad_(grad), key.to(dtype).requires_grad_(grad)


def written_out(query, key, blocks, pool):
    products = torch.einsum("bhgd,bhmd->bhgm", query, key.repeat_interleave(2, 1))
    return products.unflatten(-1, (blocks, -1, pool)).amax(-1).logsumexp(-1)


CASES = [(130, 40, 8, 1), (131, 33, 8, 4), (97, KEYS // 8 + 44, 8, 8), (1, 5, 64, 16), (0, 3, 4, 1)]


@pytest.mark.parametrize("grad", [False, True], ids=["without-graph", "with-graph"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_logarithms_of_summed_exponentials_of_largest_products(case, grad):
    groups, blocks, parts, pool = case
    query, key = factors(groups, blocks, parts, grad=grad)
    wanted = written_out(query, key, blocks, pool)
    torch.testing.assert_close(block_scores(query, key, blocks, pool=pool), wanted, rtol=0, atol=1e-12)

    def reach(rows):
        return rows // 4 + 1

    seen = torch.arange(blocks) < reach(torch.arange(groups))[:, None]
    some = block_scores(query, key, blocks, reach, pool)
    assert some.isfinite().all()
    torch.testing.assert_close(some * seen, wanted * seen, rtol=0, atol=1e-12)
    if grad:
        ours, theirs = (torch.autograd.grad((x * seen).cos().sum(), (query, key)) for x in (some, wanted))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_in_pieces_as_on_a_gpu_the_same(case, monkeypatch):
    groups, blocks, parts, pool = case
    query, key = factors(groups, blocks, parts, grad=True)

    def reach(rows):
        return rows // 4 + 1

    monkeypatch.setattr(scores, "SCORES_AT_A_TIME", 12 * 7 * blocks * parts)  # seven groups
    found = [way(query, key, blocks, reach, pool) for way in (block_scores, _in_pieces)]
    seen = torch.arange(blocks) < reach(torch.arange(groups))[:, None]
    torch.testing.assert_close(found[0] * seen, found[1] * seen, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((x * seen).cos().sum(), (query, key)) for x in found]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


def test_rows_that_nothing_learned_from_have_no_gradient():
    query, key = factors(200, 40, 8, grad=True)
    learned = torch.zeros(200, 1)
    learned[[3, 150]] = 1
    found, wanted = (x * learned for x in (block_scores(query, key, 40), written_out(query, key, 40, 1)))
    ours, theirs = (torch.autograd.grad(x.cos().sum(), (query, key)) for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert bool((ours[0].abs().sum((0, 1, 3)) > 0).equal(learned[:, 0] > 0))


def test_of_large_and_of_absent_tokens_too():
    query, key = factors(70, 40, 8, torch.float32)
    key[:, :, 8:16] -= 1e4
    key[:, :, 24:32] += 1e4
    wanted = written_out(query.double(), key.double(), 40, 1)
    torch.testing.assert_close(block_scores(query, key, 40).double(), wanted, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"index_dim": 4, "index_pool": 3, "block_size": 64}, "index_pool"),
        ({"index_pool": 4}, "index_pool"),
        ({"index_dim": 4, "index_pool": 4, "rest": True}, "index_pool"),
    ],
)
def test_pools_that_do_not_fit_are_refused(options, name):
    with pytest.raises(ValueError, match=f"--attention.{name} must be"):
        make_config("ast", options)
