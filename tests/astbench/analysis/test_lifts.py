"""Lifts of classes of tokens, and their intervals, on choices whose answer is known."""

from types import SimpleNamespace

import pytest
import torch

from astbench.analysis.lifts import Lifts, OfKeys, lifts
from astbench.analysis.rows import row_facts
from astbench.analysis.watch import Seen
from astbench_registry import AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from astbench_registry.interface import AttentionContext

HEADS, LENGTH, DIM, BLOCK = 3, 60, 5, 4
OPTIONS = {"block_size": BLOCK, "min_blocks": 1, "density": 0.3, "local_blocks": 1}


def observed(sequences, name="random_topk", marked=None):
    """Lifts over sequences of one batch; keys of `marked` tokens point where all queries do."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    q, k, v = (torch.randn(sequences, HEADS, LENGTH, DIM, generator=generator) for _ in range(3))
    if marked is not None:
        q, k = q * 0.1, k * 0.1
        q[..., 0] = 1.0
        k[..., 0] = 3.0 * marked[:, None].float()
    attention = build_attention(name, OPTIONS, AttentionShape(HEADS, HEADS, DIM)).eval()
    mask = AttentionMask("causal_self")
    with torch.no_grad():
        layout = attention(q, k, v, mask, context=AttentionContext(collect_stats=True)).stats.layout
    call, rows = Call.of(attention.shape, q, k, v, mask), torch.arange(LENGTH)
    collected = Lifts()
    collected.begin(sequences)
    slot = SimpleNamespace(path="layer", attention=attention)
    facts = row_facts(call, layout, rows)
    collected(Seen(slot, call, layout, rows, facts, True))
    return collected.keys


def test_what_is_always_kept_does_not_compete():
    (keys,) = observed(1)
    own = keys["layer"]
    assert own.kept[:BLOCK].sum() == 0 == own.expected[:BLOCK].sum(), "the first block"
    assert own.kept[-BLOCK:].sum() == 0, "every row that sees the last block stands in it"
    assert own.kept.sum() == pytest.approx(float(own.expected.sum())) and own.kept.sum() > 0
    assert own.mass.sum() == pytest.approx(float(own.expected_mass.sum()))


def test_chosen_tokens_are_found_and_others_are_not():
    marked = torch.zeros(24, LENGTH, dtype=torch.bool)
    for row, at in enumerate(torch.randint(8, 40, (24,), generator=torch.Generator().manual_seed(3)).tolist()):
        marked[row, at] = True
    keys = observed(24, "pooled_topk", marked)
    chance = torch.rand(24, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.3
    found = lifts(keys, list(torch.where(marked, 0, torch.where(chance, 1, 2))), ["marked", "some", "others"])
    value, low, high = found["marked"]["kept"]
    assert 1.5 < low < value < high and found["marked"]["r"][1] > 0
    assert found["marked"]["tokens"] == found["marked"]["sequences"] == 24
    assert found["marked"]["mass"][1] > 1.5
    low, high = found["some"]["kept"][1:]
    assert low < 1 < high


def test_intervals_of_random_choices_hold_what_they_should():
    """Classes by chance over random blocks: about one in twenty intervals leaves out the truth."""
    keys = observed(40)
    classes = torch.randint(30, (40, LENGTH), generator=torch.Generator().manual_seed(5))
    found = lifts(keys, list(classes), [str(i) for i in range(30)])
    outside = sum(not said["kept"][1] <= 1 <= said["kept"][2] for said in found.values())
    assert len(found) == 30 and outside <= 5


def test_the_bootstrap_is_over_sequences():
    """Tokens of a sequence are all alike here: a thousand of them say no more than one."""
    few = [_sequence(1, lift) for lift in (0.5, 0.8, 1.1, 1.4, 1.7, 2.0)]
    many = [_sequence(1000, lift) for lift in (0.5, 0.8, 1.1, 1.4, 1.7, 2.0)]
    narrow, wide = (lifts(one, [torch.zeros(len(s["layer"].kept)).long() for s in one], ["all"]) for one in (few, many))
    assert narrow["all"]["kept"] == wide["all"]["kept"]
    value, low, high = wide["all"]["kept"]
    assert value == pytest.approx(1.25) and low < 0.95 and high > 1.55


def _sequence(tokens, lift):
    ones = torch.ones(tokens, dtype=torch.float64)
    return {"layer": OfKeys(lift * ones, ones, lift * ones, ones)}


def test_few_sequences_and_absent_classes_have_no_interval():
    keys = [_sequence(3, 2.0) for _ in range(4)]
    found = lifts(keys, [torch.zeros(3).long()] * 4, ["here", "nowhere"])
    assert found.keys() == {"here"} and found["here"]["kept"] == [2.0, None, None]
    assert lifts([], [], ["here"]) == {}
    one_of_ten = [torch.ones(3).long()] * 9 + [torch.zeros(3).long()]
    found = lifts([_sequence(3, 2.0) for _ in range(10)], one_of_ten, ["rare", "rest"])
    assert found["rare"]["sequences"] == 1 and found["rare"]["kept"] == [2.0, None, None]
    assert found["rest"]["kept"] == [2.0, 2.0, 2.0]
