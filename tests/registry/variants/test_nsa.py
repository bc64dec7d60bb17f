"""Native sparse attention against its equations: pairs, windows and gates one after the other."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from tests import oracles
from tests.oracles import (
    BATCH,
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SELF,
    assert_same,
    attention_weights,
    real_keys,
    softmax_attention,
    visible,
)
from tests.registry.building import build

OPTIONS = {"block_size": 6, "top_k": 5, "compress_size": 6, "compress_stride": 2, "window": 4}
draw = partial(oracles.draw, hidden=HIDDEN, seed=None, grad=True)


def nsa(**options):
    return build("nsa", {**OPTIONS, **options}, hidden=HIDDEN, weights=0.4, seed=5)


def compress(phi, x, starts):
    """Equation 7, window after window."""
    out = []
    for start in starts:
        inside = x[:, :, start : start + phi.size]
        flat = (inside + phi.position).flatten(2)
        mixed = torch.nn.functional.gelu(torch.einsum("bhi,hio->bho", flat, phi.inner))
        out.append(inside.mean(2) + torch.einsum("bhi,hio->bho", mixed, phi.outer))
    return torch.stack(out, 2) if out else x[:, :, :0]


def selected_pairs(weights, starts, pattern, valid, config):
    """Equations 9 to 12: a window counts for a block once for every `stride` tokens that they share."""
    length, size, stride = valid.shape[1], config.block_size, config.compress_stride
    allowed = torch.zeros(BATCH, HEADS, length, length, dtype=torch.bool)
    blocks = range(-(-length // size))
    shared = torch.zeros(len(starts), len(blocks), dtype=torch.float64)
    for n, start in enumerate(starts):
        for token in range(start, start + config.compress_size, stride):
            shared[n, token // size] += 1
    importance = (weights @ shared).unflatten(1, (KV_HEADS, -1)).sum(2)
    for b in range(BATCH):
        real = [valid[b, x * size : (x + 1) * size].any() for x in blocks]
        for head in range(KV_HEADS):
            for i in range(length):
                scores = {}
                for block in blocks:
                    if not real[block] or (pattern == "causal_self" and block > i // size):
                        continue
                    always = block == 0 or abs(block - i // size) <= 1
                    scores[block] = float("inf") if always else importance[b, head, i, block].item()
                kept = sorted(scores, key=scores.get, reverse=True)[: config.top_k]
                for block in kept:
                    allowed[b, 2 * head : 2 * head + 2, i, block * size : (block + 1) * size] = True
    return allowed


def written_out(module, q, k, v, hidden, pattern, valid, scale):
    config, length = module.config, q.shape[2]
    position, valid = torch.arange(length), real_keys(valid, k)
    allowed = visible(length, length, pattern, valid)
    starts = list(range(0, length - config.compress_size + 1, config.compress_stride))
    seen = torch.zeros(BATCH, 1, length, len(starts), dtype=torch.bool)
    for n, start in enumerate(starts):
        last = start + config.compress_size - 1
        seen[:, 0, :, n] = valid[:, start : last + 1].all(-1)[:, None]
        if pattern == "causal_self":
            seen[:, :, :last, n] = False
    key, value = compress(module.compress_key, k, starts), compress(module.compress_value, v, starts)
    weights = attention_weights(q, key, seen, scale).detach()
    pairs = selected_pairs(weights, starts, pattern, valid, config) & allowed
    near = ((position - position[:, None]).abs() < config.window) & allowed
    gates = torch.sigmoid(hidden @ module.gate.weight.T + module.gate.bias).unflatten(-1, (HEADS, 3))
    calls = (key, value, seen), (k, v, pairs), (k, v, near)
    branches = [softmax_attention(q, *call, scale) for call in calls]
    out = sum(gates[..., n].transpose(1, 2).unsqueeze(-1) * x for n, x in enumerate(branches))
    return out, pairs, seen, near


@pytest.mark.parametrize("padding", [0.0, 0.2])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize(
    ("length", "options"),
    [(1, {}), (5, {}), (53, {}), (47, {"block_size": 4, "compress_size": 8, "compress_stride": 4, "window": 9})],
    ids=["one-token", "shorter-than-a-window", "overlapping", "windows-longer-than-blocks"],
)
def test_it_is_the_equations_written_out(length, options, pattern, padding):
    (*tensors, hidden), valid = draw(length, padding=padding)
    module = nsa(**options)
    mask = AttentionMask(pattern, key_valid=valid)
    expected, pairs, seen, near = written_out(module, *tensors, hidden, pattern, valid, 0.37)
    run = module(*tensors, mask, scale=0.37, context=AttentionContext(collect_stats=True, hidden_states=hidden))
    got, expected = mask.real_queries(run.out), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, [*tensors, *module.parameters()])
    rows = mask.real_queries(pairs.double()) if padding else pairs.double()
    layout = run.stats.layout.token_mask(causal=mask.causal, key_valid=mask.key_valid).double()
    assert torch.equal(mask.real_queries(layout), rows)
    beside = (seen.sum((2, 3)) + near.sum((2, 3))).double().expand(-1, HEADS)
    assert torch.equal(run.stats.coarse, beside)


def test_something_is_left_out_and_the_group_chooses_together():
    (q, k, v, hidden), _ = draw(53)
    run = nsa()(
        q, k, v, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True, hidden_states=hidden)
    )
    kept = run.stats.layout.to_mask()
    assert (kept[:, :, 48:].sum(-1) == 5).all()
    assert torch.equal(kept[:, 0::2], kept[:, 1::2]) and not torch.equal(kept[:, 0], kept[:, 2])


def test_untrained_compression_is_the_mean():
    fresh = build_attention("nsa", OPTIONS, AttentionShape(HEADS, KV_HEADS, DIM, hidden_size=HIDDEN)).double()
    (_, k, *_), _ = draw(53)
    pooled = (
        torch.nn.functional.avg_pool1d(k.flatten(0, 1).transpose(1, 2), 6, 2).transpose(1, 2).unflatten(0, (BATCH, -1))
    )
    got = fresh.compress_key(k)
    assert not got[:, :, :2].any()
    torch.testing.assert_close(got[:, :, 2:], pooled)


def test_flops_are_what_the_counter_sees_beside_the_kernel_calls():
    (q, k, v, hidden), _ = draw(130)
    module, mask = nsa(), AttentionMask("bidirectional_self")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call = Call.of(module.shape, q, k, v, mask)
        module.block_mass(module._compressed(call), module.selector.selection(call))
        module._gates(hidden, mask)
    listed = 3 * 64 * 2 * 64  # three groups of queries, each with the two blocks that 63 windows and 2 of zeros fill
    kernel = 4 * BATCH * HEADS * DIM * (listed + module.selector.kept_keys(130, 130, mask))
    near = module.window.flops(BATCH, 130, 130, mask)
    assert module.flops(BATCH, 130, 130, mask) == counter.get_total_flops() + kernel + near


@pytest.mark.parametrize(
    ("option", "value"), [("compress_size", 7), ("block_size", 9), ("compress_stride", 0), ("window", 1)]
)
def test_sizes_that_do_not_fit_are_refused(option, value):
    with pytest.raises(ValueError, match=f"--attention.{option} must be"):
        nsa(**{option: value})
