"""Sparse Sinkhorn attention against loops over blocks, and against the sinkhorn_transformer package."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.registry import make_config
from astbench_registry.variants.sinkhorn import sinkhorn, sorted_attention
from tests import oracles
from tests.oracles import BATCH, DIM, SELF, assert_same
from tests.registry import building

HEADS, KV_HEADS = 4, 2
build = partial(building.build, "sinkhorn", heads=HEADS, kv_heads=KV_HEADS, train=False)
draw = partial(oracles.draw, heads=HEADS, kv_heads=KV_HEADS)
draw_padded = partial(oracles.draw_padded, heads=HEADS, kv_heads=KV_HEADS)


def norm(x):
    return x / (x.square().mean() + 1e-7).sqrt()


def balanced(scores, iterations, causal):
    """Probabilities divided by their sums, no logarithms; causal: a column's sum runs up to each row."""
    p = scores.exp().tril(-1) if causal else scores.exp()
    for _ in range(iterations):
        p = p / nonzero(p.sum(1, keepdim=True))
        p = p / nonzero(p.cumsum(0) if causal else p.sum(0, keepdim=True))
    return p / nonzero(p.sum(1, keepdim=True)) if causal else p


def nonzero(x):
    return x.masked_fill(x == 0, 1.0)


def oracle(q, k, v, valid, weight, config, causal):
    """One sequence, one head, one block and one sorted place at a time, from the docstring's equations."""
    out, size = torch.zeros_like(q), config.block_size
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        real, g = valid[b].nonzero().flatten(), h // (q.shape[1] // k.shape[1])
        if not len(real):
            continue
        query, key, value = q[b, h, real] * q.shape[-1] ** -0.5, k[b, g, real], v[b, g, real]
        blocks = list(zip(query.split(size), key.split(size), value.split(size), strict=True))
        means = [norm(x.mean(0)) for _, x, _ in blocks]
        speakers = [norm(key[: u * size + 1].mean(0)) for u in range(len(blocks))] if causal else means
        scores = torch.stack(speakers) @ weight[g] @ torch.stack(means).T * q.shape[-1] ** -0.5
        sorting, rows = balanced(scores / config.temperature, config.num_iterations, causal), []
        for u, (queries, *own) in enumerate(blocks):
            candidates = range(u) if causal else range(len(blocks))
            logits, values = [], []
            for place in range(size):
                there = [w for w in candidates if place < len(blocks[w][1])]  # blocks with a token in this place
                if there:
                    share = sorting[u, there].sum() / sorting[u].sum()
                    x, y = (sum(sorting[u, w] * blocks[w][c][place] for w in there) / share for c in (1, 2))
                    logits.append(queries @ x + share.log())
                    values.append(y)
            near = queries @ own[0].T
            near = near.masked_fill(torch.ones_like(near).triu(1) > 0, -torch.inf) if causal else near
            rows.append(
                torch.cat([*(x[:, None] for x in logits), near], 1).softmax(1) @ torch.stack([*values, *own[1]])
            )
        out = out.index_put((torch.tensor(b), torch.tensor(h), real), torch.cat(rows))
    return out


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize(
    ("length", "size"),
    [(1, 4), (63, 8), (63, 16), (127, 32), (127, 500), pytest.param(1000, 64, marks=pytest.mark.slow)],
)
def test_it_is_the_equations_written_out(length, size, pattern, padding):
    tensors, valid = draw_padded(length, padding=padding, grad=True)
    module = build({"block_size": size, "num_iterations": 3})
    expected = oracle(*tensors, valid, module.sort_weight, module.config, pattern == "causal_self")
    got = module(*tensors, AttentionMask(pattern, key_valid=valid)).out
    assert_same(got, expected, [*tensors, module.sort_weight])


@pytest.mark.parametrize("causal", [False, True])
def test_given_a_permutation_the_pattern_is_two_blocks(causal):
    """With value = identity, output > 0 is the pattern: the own block and the one that is put beside it."""
    blocks, size = 8, 8
    (q, k, _), _ = draw(64, dim=64)
    g = torch.Generator().manual_seed(2)
    beside = torch.stack([torch.randperm(blocks, generator=g) for _ in range(BATCH * KV_HEADS)])
    if causal:
        beside = torch.minimum(beside, torch.arange(blocks) - 1)
    sorting = torch.zeros(BATCH * KV_HEADS, blocks, blocks, dtype=torch.float64)
    sorting.scatter_(-1, beside.clamp(min=0)[..., None], (beside >= 0).double()[..., None])
    eye = torch.eye(64, dtype=torch.float64).expand_as(k)
    args = [x.unflatten(2, (blocks, size)) for x in (q, k, eye)]
    real = torch.ones(BATCH, blocks, size, dtype=torch.bool)
    sorting = sorting.view(BATCH, KV_HEADS, blocks, blocks)
    out, slots = sorted_attention(*args, sorting, real, causal=causal, scale=0.1)
    block = torch.arange(64) // size
    own = (block[:, None] == block).tril() if causal else block[:, None] == block
    expected = own | (beside.view(BATCH, KV_HEADS, -1)[:, :, block][..., None] == block)
    support = out.flatten(2, 3) > 0
    assert torch.equal(support, expected.repeat_interleave(HEADS // KV_HEADS, 1))
    if causal:
        assert torch.equal(slots.flatten(2), expected.sum(-1))


def test_full_blocks_are_balanced_both_ways():
    (_, k, _), _ = draw(96)
    module = build({"block_size": 8, "num_iterations": 50})
    real = torch.ones(BATCH, 12, 8, dtype=torch.bool)
    sorting = module.sorting(k.unflatten(2, (12, 8)), real, causal=False)
    for dim in (-1, -2):
        torch.testing.assert_close(sorting.sum(dim), torch.ones_like(sorting[..., 0]), rtol=0, atol=1e-6)
    past = module.sorting(k.unflatten(2, (12, 8)), real, causal=True)
    assert not past.triu().any()
    torch.testing.assert_close(past.sum(-1)[..., 1:], torch.ones_like(past[..., 1:, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", SELF)
def test_removing_the_padding_changes_nothing(pattern):
    tensors, valid = draw_padded(127, padding=0.3)
    module = build({"block_size": 8})
    got = module(*tensors, AttentionMask(pattern, key_valid=valid)).out
    for b in range(BATCH):
        expected = module(*(x[b : b + 1, :, valid[b]] for x in tensors), AttentionMask(pattern)).out
        torch.testing.assert_close(got[b : b + 1, :, valid[b]], expected, rtol=0, atol=1e-12)


def test_noise_follows_seed_layer_and_step_and_only_while_training():
    tensors, _ = draw(63)
    options = {"block_size": 8}

    def run(step=0, train=True, layer=0, **more):
        module = build({**options, **more}, layer=layer, train=train)
        return module(*tensors, AttentionMask(), context=AttentionContext(step=step)).out

    state = torch.get_rng_state()
    first = run()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, run())
    for other in (run(step=1), run(layer=1), run(seed=1), run(train=False)):
        assert not torch.equal(first, other)
    assert torch.equal(run(train=False), run(step=1, train=False))


def test_noise_is_gumbel():
    noise = build()._gumbel(torch.empty(200_000, dtype=torch.float64), 0)
    assert abs(float(noise.mean()) - 0.57722) < 4 * 1.2825 / 200_000**0.5
    assert abs(float(noise.std()) - 1.28255) < 0.02


# ----- cost


@pytest.mark.parametrize(("length", "size"), [(1, 64), (50, 64), (127, 8)])
@pytest.mark.parametrize("pattern", SELF)
def test_flops_are_what_the_counter_sees(pattern, length, size):
    tensors, _ = draw(length)
    mask, module = AttentionMask(pattern), build({"block_size": size})
    with FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, length, length, mask) == counter.get_total_flops()


@pytest.mark.parametrize("pattern", SELF)
def test_memory_is_linear(pattern, largest_tensor):
    length = 8192
    tensors, _ = draw(length, batch=1, heads=1, kv_heads=1)
    with largest_tensor() as largest, torch.no_grad():
        build(heads=1, kv_heads=1)(*tensors, AttentionMask(pattern))
    assert largest.elements <= length * 2 * 64  # two blocks of 64 for every token


# ----- the package


@pytest.fixture
def package():
    return pytest.importorskip("sinkhorn_transformer.sinkhorn_transformer", reason="sinkhorn-transformer is missing")


class Given(nn.Module):
    """Stands in for the package's sorting network."""

    def __init__(self, sorting):
        super().__init__()
        self.sorting = sorting

    def forward(self, q, k, topk=1):
        return self.sorting.flatten(0, 1)


def given(package, length=64, size=8):
    """The package's attention with our sorting, and the inputs in heads and in blocks."""
    (q, k, v), _ = draw(length, kv_heads=HEADS)
    blocks = [x.unflatten(2, (-1, size)) for x in (q, k, v)]
    real = torch.ones(BATCH, length // size, size, dtype=torch.bool)
    sorting = build({"block_size": size}, kv_heads=HEADS).sorting(blocks[1], real, causal=False)
    theirs = package.SinkhornAttention(size, HEADS * DIM, DIM, HEADS, length, non_permutative=False).eval()
    theirs.sort_net = Given(sorting)
    return theirs, (q, k, v), blocks, sorting, real


def test_balancing_is_the_packages(package):
    scores = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    allowed = torch.ones(9, 9, dtype=torch.bool)
    expected = package.sinkhorn_sorting_operator(scores, 7)
    torch.testing.assert_close(sinkhorn(scores, allowed, 7, causal=False), expected, rtol=0, atol=1e-14)


def test_given_the_sorting_it_is_the_package_where_values_are_keys(package):
    theirs, (q, k, _), (q_, k_, _), sorting, real = given(package)
    got, _ = sorted_attention(q_, k_, k_, sorting, real, causal=False, scale=DIM**-0.5)
    torch.testing.assert_close(got.flatten(2, 3), theirs(q, k, k), rtol=0, atol=1e-13)


def test_fault_the_package_takes_sorted_keys_for_sorted_values(package):
    """So its output is ours with the sorted block's values exchanged, which ours never is."""
    theirs, (q, k, v), (q_, k_, v_), sorting, real = given(package)
    mixed = torch.einsum("bhuv,bhvtd->bhutd", sorting, k_)
    logits = q_ @ torch.cat([mixed, k_], 3).transpose(-1, -2) * DIM**-0.5
    expected = logits.softmax(-1) @ torch.cat([mixed, v_], 3)
    torch.testing.assert_close(theirs(q, k, v), expected.flatten(2, 3), rtol=0, atol=1e-13)
    ours, _ = sorted_attention(q_, k_, v_, sorting, real, causal=False, scale=DIM**-0.5)
    assert float((ours - expected).detach().abs().max()) > 0.1


def test_fault_the_package_adds_noise_outside_of_training(package):
    (q, k, _), _ = draw(64, kv_heads=HEADS)
    net = package.AttentionSortNet(HEADS, 8, 8, DIM, False, 0.75, 5).eval()
    first, second = (net(q.flatten(0, 1), k.flatten(0, 1)) for _ in range(2))
    assert not torch.equal(first, second)


def test_options_are_checked():
    for field, value in (("block_size", 0), ("num_iterations", 0), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=rf"--attention\.{field} must be"):
            make_config("sinkhorn", {field: value})
