"""Facts of rows against loops over every pair, in plain Python."""

import math

import pytest
import torch

from astbench.analysis.rows import DISTANCES, chosen_blocks, overlap, overlap_of_heads, row_facts, sampled_rows
from astbench_kernels import BlockLayout
from astbench_registry import build_attention
from astbench_registry.block_selection import Call
from astbench_registry.interface import AttentionContext, AttentionShape
from astbench_registry.mask import AttentionMask


def call_of(pattern, padded, length=23, heads=4, kv_heads=2, size=8, keys=None):
    generator = torch.Generator().manual_seed(3)
    keys = length if keys is None else keys
    q = torch.randn(2, heads, length, size, generator=generator) * 2
    k, v = (torch.randn(2, kv_heads, keys, size, generator=generator) for _ in range(2))
    valid = None
    if padded:
        valid = torch.ones(2, keys, dtype=torch.bool)
        valid[0, keys - 5 :] = False
    mask = AttentionMask(pattern, key_valid=valid)
    return Call.of(AttentionShape(heads, kv_heads, size), q, k, v, mask)


def chosen(call, **options):
    """The lists that an attention chose for a call."""
    shape = AttentionShape(call.q.shape[1], call.k.shape[1], call.q.shape[3])
    attention = build_attention("pooled_topk", {"block_size": 4, "top_k": 2, "min_blocks": 1, **options}, shape)
    context = AttentionContext(collect_stats=True)
    return attention(call.q, call.k, call.v, call.mask, context=context).stats.layout


CASES = [
    ("causal_self", False, {}),
    ("causal_self", True, {}),
    ("causal_self", False, {"lists": "carried", "query_tile": 8}),
    ("causal_self", True, {"lists": "carried", "query_tile": 8}),
    ("bidirectional_self", True, {"query_group": 4}),
]


@pytest.mark.parametrize("pattern, padded, options", CASES)
def test_facts_of_every_pair(pattern, padded, options):
    call = call_of(pattern, padded)
    layout = chosen(call, **options)
    rows = torch.tensor([0, 1, 7, 8, 13, 17, 21, 22])
    facts = row_facts(call, layout, rows)
    seen_pairs = layout.token_mask(causal=call.mask.causal, key_valid=call.mask.key_valid).expand(2, 4, -1, -1)
    key = call.k.repeat_interleave(2, 1)
    by_distance = {name: torch.zeros(4, DISTANCES, dtype=torch.float64) for name in ("kept", "mass")}
    for batch in range(2):
        real = [j for j in range(23) if call.mask.key_valid is None or call.mask.key_valid[batch, j]]
        for place, row in enumerate(rows.tolist()):
            is_real = row in real
            assert bool(facts.real[batch, place]) == is_real
            if not is_real:
                continue
            visible = [j for j in real if j <= row or not call.mask.causal]
            assert facts.place[batch, place] == pytest.approx(row / (len(real) - 1))
            for head in range(4):
                logits = [float(call.q[batch, head, row] @ key[batch, head, j]) * call.scale for j in visible]
                total = sum(map(math.exp, logits))
                weight = {j: math.exp(x) / total for j, x in zip(visible, logits, strict=True)}
                kept = [j for j in visible if seen_pairs[batch, head, row, j]]
                blocks = sorted({j // 4 for j in kept})
                found = facts.chosen[batch, head, place].nonzero()[:, 0].tolist()
                assert found == blocks
                assert facts.kept[batch, head, place] == pytest.approx(len(kept) / len(visible))
                assert facts.mass[batch, head, place] == pytest.approx(sum(weight[j] for j in kept), abs=1e-5)
                of_block = [sum(weight.get(j, 0.0) for j in range(b * 4, b * 4 + 4)) for b in range(6)]
                best = sum(sorted(of_block, reverse=True)[: len(blocks)])
                assert facts.best[batch, head, place] == pytest.approx(best, abs=1e-5)
                assert facts.best[batch, head, place] >= facts.mass[batch, head, place] - 1e-5
                bits = -sum(w * math.log2(w) for w in weight.values())
                assert facts.bits[batch, head, place] == pytest.approx(bits, abs=1e-4)
                for j in visible:
                    distance = abs(row - j)
                    number = 0 if distance == 0 else int(math.log2(distance)) + 1
                    by_distance["kept"][head, number] += j in kept
                    by_distance["mass"][head, number] += weight[j]
    assert torch.equal(facts.kept_by_distance, by_distance["kept"])
    assert torch.allclose(facts.mass_by_distance, by_distance["mass"], atol=1e-5)
    assert facts.kept_of_key.sum() == by_distance["kept"].sum()
    assert facts.seen_by_distance.sum() == facts.seen_of_key.sum()
    assert torch.allclose(facts.mass_of_key.sum((0, 2)), by_distance["mass"].sum(1), atol=1e-4)


def test_of_cross_attention_there_is_no_distance():
    call = call_of("bidirectional_cross", False, keys=12)
    layout = chosen(call, query_group=4)
    facts = row_facts(call, layout, torch.arange(23))
    assert facts.seen_by_distance[0] == 2 * 23 * 12 and facts.seen_by_distance[1:].sum() == 0
    assert facts.real.all() and facts.mass_by_distance[:, 0].tolist() == pytest.approx([46.0] * 4, abs=1e-3)


def test_all_blocks_kept_keep_all_mass():
    call = call_of("causal_self", True)
    facts = row_facts(call, chosen(call, top_k=6), torch.arange(23))
    real = facts.real[:, None].expand_as(facts.mass)
    assert torch.allclose(facts.mass[real], torch.ones(())) and torch.equal(
        facts.kept[real], torch.ones(int(real.sum()))
    )
    assert not facts.mass[~real].any() and not facts.kept[~real].any()


def test_overlaps_by_hand():
    one, other = torch.tensor([1, 1, 0, 0], dtype=torch.bool), torch.tensor([0, 1, 1, 0], dtype=torch.bool)
    none = torch.zeros(4, dtype=torch.bool)
    assert overlap(one, other) == pytest.approx(1 / 3) and overlap(one, one) == 1.0 and overlap(one, none) == 0.0
    assert overlap(none, none).isnan()
    heads = torch.stack([one, other, one])[None, :, None]
    assert overlap_of_heads(heads).tolist() == [[pytest.approx((1 / 3 + 1 + 1 / 3) / 3)]]
    assert overlap_of_heads(heads[:, :1]).isnan().all()


def test_carried_lists_grow_within_a_tile():
    keep = torch.zeros(1, 1, 8, 4, dtype=torch.bool)
    keep[0, 0, :, 0] = True
    keep[0, 0, 2, 1] = True
    layout = BlockLayout.carried(keep, block_size=2, query_group=4, query_length=8, key_length=8)
    found = chosen_blocks(layout, torch.arange(8))[0, 0, :, 1].tolist()
    assert found == [False, False, True, True, False, False, False, False]


def test_sampled_rows():
    assert sampled_rows(3, 8, torch.device("cpu")).tolist() == [0, 1, 2]
    rows = sampled_rows(4096, 64, torch.device("cpu"))
    assert torch.equal(rows // 64, torch.arange(64)), "one of each part"
    places = torch.bincount(rows % 64 // 8, minlength=8)
    assert places.min() >= 6 and places.max() <= 10, "at all places in blocks of 64"
    assert sampled_rows(1000, 1, torch.device("cpu")).tolist() == [500]
