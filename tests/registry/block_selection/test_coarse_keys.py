"""Coarse tokens of `ast` against one dense softmax over single and pooled keys, written down pair by pair."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from tests.oracles import BATCH, DIM, FUSED_ON_CPU, HEADS, KV_HEADS, draw
from tests.registry.building import build

OPTIONS = {"block_size": 4, "min_blocks": 2, "density": 0.4, "coarse_stride": 3}


def layer(**options):
    module = build("ast", {**OPTIONS, **options}, train=False)
    with torch.no_grad():
        for parameter in module.coarse_keys.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return module


def expected(module, q, k, v, mask, layout):
    """Out of `(query, key)` pairs: the layout's single keys, and windows whose last token is visible and all real."""
    stride, repeats = module.coarse_keys.stride, HEADS // KV_HEADS
    windows = k.shape[2] // stride
    key_weights, value_weights = (
        module.coarse_keys.key_pooling.softmax(-1),
        module.coarse_keys.value_pooling.softmax(-1),
    )
    coarse_k = torch.stack(
        [(k[:, :, w * stride : (w + 1) * stride] * key_weights[:, :, None]).sum(2) for w in range(windows)], 2
    )
    coarse_v = torch.stack(
        [(v[:, :, w * stride : (w + 1) * stride] * value_weights[:, :, None]).sum(2) for w in range(windows)], 2
    )
    fine = layout.token_mask(causal=mask.causal, key_valid=mask.key_valid)
    seen = torch.ones(BATCH, 1, q.shape[2], windows, dtype=torch.bool)
    for row in range(q.shape[2]):
        for window in range(windows):
            last = (window + 1) * stride - 1
            if mask.causal and last > row + mask.query_offset:
                seen[:, :, row, window] = False
            if mask.key_valid is not None:
                seen[:, 0, row, window] &= mask.key_valid[:, last - stride + 1 : last + 1].all(-1)
    keys = torch.cat([k, coarse_k], 2).repeat_interleave(repeats, 1)
    values = torch.cat([v, coarse_v], 2).repeat_interleave(repeats, 1)
    logits = q @ keys.transpose(-1, -2) * DIM**-0.5
    logits[..., k.shape[2] :] += math.log(stride)
    logits = logits.masked_fill(
        ~torch.cat([fine.expand(-1, HEADS, -1, -1), seen.expand(-1, HEADS, -1, -1)], -1), -math.inf
    )
    return logits.softmax(-1).nan_to_num(0.0) @ values


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("pattern", ["causal_self", "bidirectional_self", "bidirectional_cross", "causal_cross"])
def test_one_softmax_over_single_and_coarse_tokens(pattern, padded):
    cross = pattern.endswith("cross")
    query_length, key_length = (29, 44) if cross else (41, 41)
    valid = torch.ones(BATCH, key_length, dtype=torch.bool)
    valid[1, 31:] = False
    mask = AttentionMask(pattern, key_valid=valid if padded else None)
    module, ((q, k, v), _) = layer(), draw(query_length, key_length)
    got = module(q, k, v, mask, context=AttentionContext(collect_stats=True))
    real = torch.ones(BATCH, query_length, dtype=torch.bool) if cross or not padded else valid
    want = expected(module, q, k, v, mask, got.stats.layout)
    torch.testing.assert_close(got.out[real[:, None].expand(-1, HEADS, -1)], want[real[:, None].expand(-1, HEADS, -1)])
    assert got.stats.coarse.shape == (BATCH, HEADS)


def test_the_stride_doubles_in_higher_layers():
    options = {"coarse_stride": 4, "coarse_from": 2, "coarse_every": 2}
    strides = []
    for index in range(7):
        shape = AttentionShape(HEADS, KV_HEADS, DIM, layer_index=index, num_layers=7)
        coarse = build_attention("ast", options, shape).coarse_keys
        strides.append(coarse.stride if coarse else 0)
    assert strides == [0, 0, 4, 4, 8, 8, 16]


def test_shorter_than_a_window_there_are_no_coarse_tokens():
    (q, k, v), _ = draw(5)
    with_them, without = layer(coarse_stride=6), layer()
    without.coarse_keys = None
    without.load_state_dict(with_them.state_dict(), strict=False)
    mask = AttentionMask("causal_self")
    assert torch.equal(with_them(q, k, v, mask).out, without(q, k, v, mask).out)


@pytest.mark.parametrize("pattern", ["causal_self", "bidirectional_self"])
def test_flops_grow_by_what_the_counter_sees(pattern):
    (q, k, v), _ = draw(130)
    module, mask = layer(), AttentionMask(pattern)
    declared = module.coarse_keys.flops(BATCH, HEADS, 130, 130, DIM, mask)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        module.coarse_keys(Call.of(module.shape, q, k, v, mask, 1.0), "gather")
    assert declared == counter.get_total_flops()
