"""Every variant against a witness that shares no code with it."""

import math
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_kernels import BlockLayout, block_sparse_attention, soft_top_k
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from tests.oracles import BATCH, DIM, HEADS, KV_HEADS, PATTERNS, assert_same, draw, softmax_attention, visible
from tests.registry import building

SELECTORS = ["random_topk", "pooled_topk", "oracle_topk", "ast"]
build = partial(building.build, train=False)
SMALL = {"block_size": 4, "min_blocks": 2, "density": 0.3}


def identity_run(name, options, pattern, *, padding=0.0, size=61, layer=0):
    """Output with value = identity (head_dim = length), whose support is the pattern; and the statistics."""
    (q, k, _), valid = draw(size, dim=size, padding=padding)
    eye = torch.eye(size, dtype=torch.float64).expand_as(k)
    module = build(name, options, dim=size, layer=layer)
    out = module(q, k, eye, AttentionMask(pattern, key_valid=valid), context=AttentionContext(collect_stats=True))
    return out.out > 0, out.stats, (q, k, valid)


# ----- dense


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_is_softmax_written_out(pattern, padding):
    keys = 101 if pattern.endswith("self") else 73
    tensors, valid = draw(101, keys, padding=padding, grad=True)
    expected = softmax_attention(*tensors, visible(101, keys, pattern, valid))
    mask = AttentionMask(pattern, key_valid=valid)
    got = build("dense")(*tensors, mask).out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors, gradients=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_flops_are_what_the_counter_sees(pattern):
    keys = 37 if pattern.endswith("self") else 53
    tensors, _ = draw(37, keys)
    mask, module = AttentionMask(pattern), build("dense")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, 37, keys, mask) == counter.get_total_flops()


# ----- local


def band(length, window, pattern, valid):
    position = torch.arange(length)
    near = (position[:, None] - position).abs() <= window
    return near & visible(length, length, pattern, valid)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS[:2])
@pytest.mark.parametrize(("length", "window"), [(1, 5), (63, 5), (127, 40), (127, 1), (1000, 33)])
def test_local_is_a_band(length, window, pattern, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    expected = softmax_attention(*tensors, band(length, window, pattern, valid))
    mask = AttentionMask(pattern, key_valid=valid)
    got = build("local", {"window": window})(*tensors, mask).out
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS[:2])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_local_pattern_is_exact(window, pattern, padding):
    support, stats, (_, _, valid) = identity_run("local", {"window": window}, pattern, padding=padding)
    expected = band(61, window, pattern, valid).expand_as(support)
    assert torch.equal(support, expected)
    assert torch.equal(stats.attended, expected.sum((-1, -2)).double())


@pytest.mark.parametrize("causal", [True, False])
def test_local_against_the_local_attention_package(causal):
    package = pytest.importorskip("local_attention", reason="local-attention is not installed")
    window, length = 8, 64  # the package wants multiples of the window, and pads nothing then
    theirs = package.LocalAttention(
        dim=DIM,
        window_size=window,
        causal=causal,
        exact_windowsize=True,
        autopad=False,
        use_rotary_pos_emb=False,
    )
    (q, k, v), _ = draw(length)
    k_all, v_all = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    expected = theirs(q, k_all, v_all)
    got = build("local", {"window": window})(q, k, v, AttentionMask(PATTERNS[int(causal)])).out
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# ----- selectors


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", SELECTORS)
def test_selector_is_masked_softmax_over_its_own_layout(name, pattern, padding):
    keys = 149 if pattern.endswith("self") else 113
    tensors, valid = draw(149, keys, padding=padding)
    mask = AttentionMask(pattern, key_valid=valid)
    out = build(name, SMALL)(*tensors, mask, context=AttentionContext(collect_stats=True))
    assert float(out.stats.density.max()) < 0.75, "the case must leave something out"
    allowed = out.stats.layout.token_mask(causal=mask.causal, key_valid=valid)
    got, expected = (mask.real_queries(x) for x in (out.out, softmax_attention(*tensors, allowed)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(out.stats.attended, allowed.sum((-1, -2)).double())


@pytest.mark.parametrize("pattern", PATTERNS[:2])
@pytest.mark.parametrize("name", SELECTORS)
def test_budget_and_forced_blocks_are_kept(name, pattern):
    """Counted from the support of the output alone."""
    options = {"block_size": 4, "top_k": 5, "min_blocks": 1, "local_blocks": 1, "query_group": 1}
    support, _, _ = identity_run(name, options, pattern)
    blocks = torch.nn.functional.pad(support, (0, 3)).unflatten(-1, (16, 4)).any(-1)
    own = torch.arange(61) // 4
    assert blocks[..., 0].all()
    assert blocks.gather(-1, own.view(1, 1, -1, 1).expand(BATCH, HEADS, -1, 1)).all()
    assert blocks[:, :, 4:].gather(-1, (own[4:] - 1).view(1, 1, -1, 1).expand(BATCH, HEADS, -1, 1)).all()
    seen = own + 1 if pattern == "causal_self" else torch.full((61,), 16)
    assert torch.equal(blocks.sum(-1), seen.clamp(max=5).expand(BATCH, HEADS, -1))


def random_blocks(*, seed=0, layer=0, length=512):
    """Kept blocks `(heads, queries, blocks)` of random_topk, four of 32, without forced ones."""
    options = {
        "block_size": 16,
        "top_k": 4,
        "min_blocks": 1,
        "query_group": 1,
        "sink_block": False,
        "seed": seed,
    }
    (q, k, v), _ = draw(length, batch=1)
    mask = AttentionMask("bidirectional_cross")
    out = build("random_topk", options, layer=layer)(q, k, v, mask, context=AttentionContext(collect_stats=True))
    return out.stats.layout.to_mask()[0]


def test_random_topk_is_reproducible_and_differs_by_seed_layer_and_head():
    first = random_blocks()
    assert torch.equal(first, random_blocks())
    assert (first.sum(-1) == 4).all()
    for other in (random_blocks(seed=1), random_blocks(layer=1), first.roll(1, 0), first.roll(1, 1)):
        shared = (first & other).sum(-1).double().mean()
        assert abs(float(shared) - 4 * 4 / 32) < 0.05  # as two independent draws


def test_random_topk_is_spread_evenly():
    counts = random_blocks().double().sum((0, 1))  # how often each of 32 blocks was drawn
    expected = counts.sum() / 32
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 61.1, "chi-square with 31 degrees of freedom exceeds this once in 1000"


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_oracle_picks_the_blocks_of_most_dense_mass(pattern, group):
    keys = 96 if pattern.endswith("self") else 128
    (q, k, v), _ = draw(96, keys)
    options = {"block_size": 8, "top_k": 4, "min_blocks": 1, "query_group": group}
    mask = AttentionMask(pattern)
    out = build("oracle_topk", options)(q, k, v, mask, context=AttentionContext(collect_stats=True))
    kept = out.stats.layout.to_mask()

    eye = torch.eye(keys, dtype=torch.float64).expand(BATCH, KV_HEADS, keys, keys)
    mass = softmax_attention(q, k, eye, visible(96, keys, pattern, None)).unflatten(-1, (-1, 8)).sum(-1)
    mass = mass.unflatten(2, (-1, group)).sum(3)
    rows = torch.arange(0, 96, group)
    forced = torch.zeros(len(rows), keys // 8, dtype=torch.bool)
    forced[:, 0] = True
    if pattern.endswith("self"):
        forced[torch.arange(len(rows)), rows // 8] = True
    free = mass.masked_fill(forced, -1.0)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(len(rows))).tolist():
        seen = int(rows[i]) // 8 + 1 if pattern == "causal_self" else keys // 8
        number = min(4, seen) - int(forced[i].sum())
        best = set(free[b, h, i, :seen].topk(number).indices.tolist()) | set(forced[i].nonzero().flatten().tolist())
        assert set(kept[b, h, i].nonzero().flatten().tolist()) == best


# ----- ast


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_untrained_ast_is_pooled_topk_to_the_bit(pattern, dtype):
    keys = 149 if pattern.endswith("self") else 113
    tensors, valid = draw(149, keys, padding=0.2)
    tensors = [x.to(dtype) for x in tensors]
    mask = AttentionMask(pattern, key_valid=valid)
    ours, theirs = (build(name, SMALL).to(dtype)(*tensors, mask).out for name in ("ast", "pooled_topk"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_straight_through_alone_reaches_the_predictor(pattern):
    """Without distillation, and without changing the output by a bit."""
    tensors, _ = draw(131, 131 if pattern.endswith("self") else 89)
    mask, options = AttentionMask(pattern), {**SMALL, "distill_weight": 0.0}
    module = build("ast", options, train=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    plain = build("pooled_topk", SMALL)(*tensors, mask).out
    for step in range(2):
        out = module(*tensors, mask)
        assert not out.losses
        if step == 0:
            torch.testing.assert_close(out.out, plain, rtol=0, atol=1e-12)
        optimizer.zero_grad()
        ((out.out - 1) ** 2).sum().backward()
        optimizer.step()
    for name in ("gain", "key_weight", "query_weight"):
        assert float(module.get_parameter(name).grad.abs().max()) > 1e-6, name


def test_patterns_are_cosines_of_the_distance_in_blocks():
    tensors, _ = draw(131, 131)
    mask, options = AttentionMask("causal_self"), {**SMALL, "query_group": 4}
    plain, patterned = build("ast", options), build("ast", {**options, "patterns": 2})
    patterned.load_state_dict(plain.state_dict(), strict=False)
    weight = torch.linspace(-1, 2, 2 * patterned.shape.num_heads, dtype=torch.float64).view(-1, 2)
    with torch.no_grad():
        patterned.pattern_weight.copy_(weight)
    call = Call.of(plain.shape, *tensors, mask, 0.3)
    before, after = (m.scores(call, m.selection(call)).detach() for m in (plain, patterned))
    for head, group, block in ((0, 0, 0), (1, 7, 3), (2, 30, 9)):
        distance = group * 4 / plain.config.block_size - block
        added = sum(float(w) * math.cos(2 * math.pi * distance / p) for w, p in zip(weight[head], (4, 8), strict=True))
        assert float((after - before)[0, head, group, block]) == pytest.approx(added, abs=1e-9)


def test_heads_learn_which_pattern_to_follow():
    """One head's attention is near, the other's periodic; content says nothing."""
    options = {"block_size": 4, "top_k": 5, "min_blocks": 1, "query_group": 1, "sink_block": False, "patterns": 5}
    learner = {**options, "estimator": "none", "distill_weight": 1.0, "distill_fraction": 1.0}
    module = build_attention("ast", learner, AttentionShape(2, 2, 8)).double().train()
    torch.manual_seed(0)
    position = torch.arange(128, dtype=torch.float64)
    # Rotary-like features: the dot product is cos(2 pi distance / period), period 512 tokens and 16 tokens (4 blocks).
    angle = 2 * math.pi * position[:, None] / torch.tensor([512.0, 16.0], dtype=torch.float64)
    waves = torch.stack([angle.cos(), angle.sin()], -1).permute(1, 0, 2)  # (heads, length, 2)
    q, k, v = (torch.zeros(1, 2, 128, 8, dtype=torch.float64) for _ in range(3))
    q[0, :, :, :2], k[0, :, :, :2] = 20 * waves, waves
    v += 1.0
    optimizer = torch.optim.Adam([module.pattern_weight], lr=0.05)
    with torch.no_grad():
        module.gain.fill_(-20.0)  # the pooled score, which knows the answer here, is silent
    for _ in range(60):
        optimizer.zero_grad()
        module(q, k, v, AttentionMask("causal_self")).losses["distill"].backward()
        optimizer.step()
    near, periodic = module.pattern_weight.detach()
    assert float(near[-1]) > 0.5 and float(near[-1]) > 2 * abs(float(near[0]))
    assert float(periodic[0]) > 0.5 and float(periodic[0]) > 2 * abs(float(periodic[-1]))


def test_global_tokens_see_all_and_are_seen_by_all():
    tensors, valid = draw(131, 131, padding=0.2)
    options = {**SMALL, "query_group": 4, "top_k": 4, "min_blocks": 1}
    named = torch.zeros(2, 131, dtype=torch.bool)
    tokens = [int(real.nonzero()[n]) for real, n in zip(valid, (40, 9), strict=True)]
    named[[0, 1], tokens] = True
    mask = AttentionMask("bidirectional_self", key_valid=valid)

    def chosen(on, pattern="bidirectional_self"):
        context = AttentionContext(collect_stats=True, global_tokens=named)
        where = AttentionMask(pattern, key_valid=valid)
        return build("ast", {**options, "global_tokens": on})(*tensors, where, context=context).stats.layout

    layout = chosen(True)
    module = build("ast", options)
    blocks, visible = layout.to_mask(), module.selection(Call.of(module.shape, *tensors, mask)).visible
    for row, token in enumerate(tokens):
        seen = visible[row, 0].any(-1)  # groups of padding alone see their keys' blocks too
        assert blocks[row, :, seen, token // layout.block_size].all()
        assert torch.equal(blocks[row, :, token // 4], visible[row, :, 0].expand_as(blocks[row, :, token // 4]))
    other = torch.tensor([g for g in range(blocks.shape[2]) if g not in [token // 4 for token in tokens]])
    assert int(layout.counts[:, :, other].max()) == 4  # what is global counts
    off = chosen(False).to_mask()
    assert not off[0, :, tokens[0] // 4].all() and not torch.equal(blocks, off)
    # A task that names tokens means nothing by it where the future must not be seen.
    assert torch.equal(*(chosen(on, "causal_self").to_mask() for on in (True, False)))


def planted(batch, seed, *, length=128, block=8):
    """One key in each query's needle block matches it exactly; the block's other keys cancel it in the mean.

    So the pooled score is blind to the needle, but the block's extremes (and so the learned term) are not.
    """
    g = torch.Generator().manual_seed(seed)
    blocks = length // block
    direction = torch.nn.functional.one_hot(torch.randint(0, 4, (batch, blocks), generator=g), 4).double() * 2 - 1
    needle = torch.randint(1, blocks - 1, (batch, length), generator=g)
    k = torch.randn(batch, blocks, block, 8, generator=g, dtype=torch.float64) * 0.1
    k[..., :4] = k[..., :4] - 6 * direction[:, :, None] / (block - 1)
    place = torch.randint(0, block, (batch, blocks), generator=g)
    k[torch.arange(batch)[:, None], torch.arange(blocks), place, :4] = 6 * direction
    k = k - k.mean(2, keepdim=True)
    q = torch.zeros(batch, length, 8, dtype=torch.float64)
    q[..., :4] = 3 * direction.gather(1, needle[..., None].expand(-1, -1, 4))
    v = torch.randn(batch, length, 8, generator=g, dtype=torch.float64)
    return q[:, None], k.flatten(1, 2)[:, None], v[:, None]


def recall_of_oracle(module, oracle, tensors, mask):
    """Share of the oracle's blocks that the module keeps too."""
    context = AttentionContext(collect_stats=True)
    with torch.no_grad():
        ours, best = (m.eval()(*tensors, mask, context=context).stats.layout.to_mask() for m in (module, oracle))
    return float((ours & best).sum() / best.sum())


@pytest.mark.parametrize("pattern", ["bidirectional_cross", "causal_self"])
def test_distillation_teaches_the_oracles_blocks(pattern):
    options = {"block_size": 8, "top_k": 5, "min_blocks": 1, "query_group": 1}
    shape = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=8)
    torch.manual_seed(0)
    learner = {**options, "estimator": "none", "distill_weight": 1.0, "distill_fraction": 0.5, "rank": 8}
    module = build_attention("ast", learner, shape).double()
    oracle = build_attention("oracle_topk", options, shape).double()
    mask, held_out = AttentionMask(pattern), planted(4, seed=999)
    before = recall_of_oracle(module, oracle, held_out, mask)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    module.train()
    for step in range(60):
        optimizer.zero_grad()
        module(*planted(4, seed=step), mask).losses["distill"].backward()
        optimizer.step()
    after = recall_of_oracle(module, oracle, held_out, mask)
    assert after > before + 0.15, f"recall of the oracle's blocks went from {before:.2f} to {after:.2f}"


def test_dense_steps_teach_the_choice_of_the_last_one():
    """The task's gradient alone, in steps that keep every block: it wants more of the needles."""
    options = {"block_size": 8, "density": 5 / 16, "min_blocks": 1, "query_group": 1, "local_blocks": 0}
    shape = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=8)
    torch.manual_seed(0)
    dense = {"density_start": 1.0, "density_hold": 1000, "density_steps": 1001, "distill_weight": 0.0, "rank": 8}
    module = build_attention("ast", {**options, **dense}, shape).double()
    oracle = build_attention("oracle_topk", options, shape).double()
    mask, held_out = AttentionMask("bidirectional_cross"), planted(4, seed=999)
    before = recall_of_oracle(module, oracle, held_out, mask)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    module.train()
    for step in range(60):
        q, k, v = planted(4, seed=step)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=2.0)
        output = module(q, k, v, mask, context=AttentionContext(step=step, collect_stats=True))
        assert output.stats.density.min() == 1.0
        optimizer.zero_grad()
        (output.out - wanted).square().mean().backward()
        optimizer.step()
    after = recall_of_oracle(module, oracle, held_out, mask)
    assert after > before + 0.05, f"recall of the oracle's blocks went from {before:.2f} to {after:.2f}"


def test_ast_schedules():
    options = {"density": 0.2, "density_start": 1.0, "density_hold": 4, "density_steps": 8, "distill_decay_steps": 10}
    attention = build_attention("ast", options, AttentionShape(2, 2, 8)).train()
    assert [round(attention.density_at(step), 9) for step in (0, 4, 6, 8, 99)] == [1.0, 1.0, 0.6, 0.2, 0.2]
    q, k, v = (torch.randn(1, 2, 256, 8) for _ in range(3))
    mask = AttentionMask("bidirectional_self")

    def run(step):
        output = attention(q, k, v, mask, context=AttentionContext(step=step, collect_stats=True))
        return output.stats.layout.density(causal=False).mean().item(), output.losses.get("distill", torch.tensor(0.0))

    (dense, taught), (half, _), (sparse, last) = run(0), run(6), run(10)
    assert dense == 1.0 and 0.6 <= half < 0.7 and sparse < 0.55  # at least 8 of the 16 blocks are kept
    assert taught > 0 and last == 0
    attention.eval()
    assert attention.density_at(0) == 0.2


def test_sampled_blocks_are_kept_as_often_as_the_differentiable_top_k_says():
    options = {"block_size": 1, "query_group": 1, "top_k": 6, "min_blocks": 1, "sink_block": False}
    attention = build_attention("ast", {**options, "sample": True}, AttentionShape(1, 1, 8)).train()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 24, 8, generator=g) for _ in range(3))
    q = q[:, :, :1].expand(-1, -1, 4000, -1)  # one query, asked four thousand times
    mask, context = AttentionMask("bidirectional_cross"), AttentionContext(collect_stats=True)
    torch.manual_seed(0)
    kept = attention(q, k, v, mask, context=context).stats.layout.to_mask()[0, 0]
    assert (kept.sum(-1) == 6).all()
    scores = (q[0, 0, :1] @ k[0, 0].T * 8**-0.5)[None, None].double()
    p = soft_top_k(scores, torch.tensor([[[6]]]), torch.ones_like(scores, dtype=torch.bool), 0.5).exp()[0, 0, 0]
    assert p.min() < 0.1 and p.max() > 0.7
    # Exactly six at a time and not six on average: frequencies are drawn apart a little.
    torch.testing.assert_close(kept.double().mean(0), p, rtol=0, atol=0.05)
    attention.eval()
    assert attention(q, k, v, mask, context=context).stats.layout.to_mask()[0, 0].unique(dim=0).shape[0] == 1


def test_the_mixed_schedule_has_either_density_more_and_more_often_the_final_one():
    options = {"density": 0.2, "density_start": 1.0, "density_hold": 100, "density_steps": 500}
    shape = AttentionShape(2, 2, 8)
    attention = build_attention("ast", {**options, "density_schedule": "mixed"}, shape).train()
    density = torch.tensor([attention.density_at(step) for step in range(600)])
    assert set(density.tolist()) == {torch.tensor(0.2).item(), 1.0}
    share = (density < 1).double().unflatten(0, (6, 100)).mean(1)
    expected = torch.tensor([0, 0.125, 0.375, 0.625, 0.875, 1], dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)  # by chance it would be 0.05


def test_given_layout_is_masked_softmax():
    """The kernel call that all selectors share, with a layout that nobody chose."""
    (q, k, v), valid = draw(37, 53, padding=0.2)
    keep = torch.rand(BATCH, KV_HEADS, 8, 14, generator=torch.Generator().manual_seed(3)) < 0.4
    layout = BlockLayout.from_mask(keep, block_size=4, query_group=5, query_length=37, key_length=53)
    allowed = keep.repeat_interleave(2, 1).repeat_interleave(5, 2)[:, :, :37]
    allowed = allowed.repeat_interleave(4, 3)[..., :53] & valid[:, None, None, :]
    got, _ = block_sparse_attention(q, k, v, layout, key_valid=valid)
    torch.testing.assert_close(got, softmax_attention(q, k, v, allowed), rtol=0, atol=1e-12)
