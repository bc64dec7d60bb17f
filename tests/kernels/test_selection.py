"""Which blocks a budget keeps, and the lists that are made of them."""

from dataclasses import fields

import pytest
import torch

from astbench_kernels import BlockLayout, layout, select_blocks

BLOCKS = 12


def by_hand(scores, always_kept, candidates, budget):
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        here = tuple(place)
        must, may = (x.expand(scores.shape)[here] for x in (always_kept, candidates))
        free = (may & ~must).nonzero().flatten().tolist()
        best = sorted(free, key=lambda j, here=here: (-float(scores[here][j]), j))
        kept[here] = must
        kept[here][best[: max(0, int(budget.expand(scores.shape[:3])[here]) - int(must.sum()))]] = True
    return kept


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 2, 5, 9, BLOCKS])
def test_the_best_within_the_budget(groups, equal, budget):
    g = torch.Generator().manual_seed(budget)
    scores = torch.randn(2, 3, groups, BLOCKS, generator=g)
    if equal:
        scores = scores.round()
    for share in (0.0, 0.2, 1.0):
        masks = [torch.rand(1, 1, groups, BLOCKS, generator=g) < x for x in (share, 0.8)]
        wanted = torch.tensor(budget).expand(1, 1, groups)
        found = select_blocks(scores, always_kept=masks[0], candidates=masks[1], budget=wanted)
        assert torch.equal(found, by_hand(scores, *masks, wanted))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("carried", [False, True])
def test_few_lists_are_those_of_many(monkeypatch, share, carried):
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 3, 1, BLOCKS, generator=g) < share
    shape = {"block_size": 4, "query_length": 1, "key_length": 46, "query_offset": 45}
    before = torch.randint(0, 9, (2, 3, BLOCKS), generator=g, dtype=torch.int32) if carried else None

    def lists():
        if carried:
            return BlockLayout.carried(keep, query_group=8, before=before, **shape)
        return BlockLayout.from_mask(keep, query_group=1, **shape)

    few = lists()
    monkeypatch.setattr(layout, "FEW_BLOCKS", 0)
    many = lists()
    for name in (field.name for field in fields(few) if field.compare):
        one, two = getattr(few, name), getattr(many, name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name
    assert few.sound and torch.equal(few.first_rows(), BlockLayout.first_rows(few.expand_heads(3)))
