"""Thresholds on shares: what each would keep, counted over calls and written out."""

import pytest
import torch

from astbench_registry.budget import ShareCounts


def units(seed):
    g = torch.Generator().manual_seed(seed)
    share = torch.randn(2, 3, 5, 7, generator=g).mul(3).sub(4).clamp(max=0)
    share[0, 0, 0] = -torch.inf
    return share, torch.rand(2, 1, 5, 7, generator=g) < 0.1, torch.rand(2, 1, 5, 7, generator=g) < 0.8


def kept(share, calls):
    found = visible = 0
    for log_share, always, seen in calls:
        chosen = (always | (log_share >= torch.tensor(share).log())) & seen
        found += int(chosen.sum())
        visible += int(seen.expand_as(log_share).sum())
    return found / visible


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_the_share_found_keeps_as_much_as_is_wanted(density):
    counts, calls = ShareCounts(), [units(seed) for seed in range(4)]
    for call in calls:
        counts.add(*call)
    share = counts.share_for(density)
    assert kept(share, calls) == pytest.approx(counts.density(share), abs=1e-9)
    assert density - 0.02 < kept(share, calls) <= density


def test_more_than_all_and_less_than_what_is_always_kept():
    counts, call = ShareCounts(), units(0)
    counts.add(*call)
    assert kept(counts.share_for(1.0), [call]) > 0.95  # all but what has no share at all
    assert counts.share_for(0.01) == 1.0
    assert counts.density(1.0) >= counts.always_kept / counts.visible > 0.01


def test_nothing_counted():
    counts = ShareCounts()
    assert counts.share_for(0.5) == 1.0 and counts.density(0.5) == 1.0
