"""Budgets that are calibrated: the share of tiles that was asked for, kept with the model."""

import pytest
import torch

from astbench import swap_attention
from tests.astbench.conftest import VOCABULARY, tiny_model

OPTIONS = {"budget": "calibrated", "block_size": 4, "min_blocks": 1, "query_tile": 8}


def ids(length=200, batch=3, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibrated(passes=2, mask=None, **options):
    model = tiny_model("llama").eval()
    handle = swap_attention(model, "ast", {**OPTIONS, **options})
    with torch.no_grad():
        for _ in range(passes):
            with handle.budgeting():
                model(ids(), attention_mask=mask)
    return model, handle


@torch.no_grad()
def computed(model, handle, mask=None):
    """Share of tiles where lists are carried, else of the visible pairs."""
    with handle.collecting_stats() as slots:
        model(ids(), attention_mask=mask)
        stats = [slot.stats for slot in slots]
    some = sum(float((x.attended if x.tiles is None else x.tiles).sum()) for x in stats)
    return some / sum(float(x.visible.sum()) * x.attended.shape[1] for x in stats)


@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize(("lists", "off"), [("carried", 0.005), ("own", 0.02)])
def test_what_is_asked_for_is_computed(lists, off, density):
    model, handle = calibrated(lists=lists, density=density)
    assert computed(model, handle) == pytest.approx(density, abs=off)
    assert f"({density:g} wanted" in handle.notes[-1]
    assert len({float(slot.attention.calibrated_share) for slot in handle.slots}) == 1


@pytest.mark.parametrize("options", [{"index_dim": 2, "index_pool": 2}, {"min_blocks": 4}, {"sub_blocks": 2}])
def test_with_other_scores_and_floors(options):
    model, handle = calibrated(lists="carried", density=0.55, **options)
    assert computed(model, handle) == pytest.approx(0.55, abs=0.02)


def test_padding_is_not_counted():
    mask = torch.ones(3, 200, dtype=torch.long)
    mask[0, 120:] = 0
    mask[1, :50] = 0
    _, handle = calibrated(1, mask, lists="carried", density=0.3)
    alone = tiny_model("llama").eval()
    other = swap_attention(alone, "ast", {**OPTIONS, "lists": "carried", "density": 0.3})
    with torch.no_grad(), other.budgeting():
        alone(ids()[:1, :120])
        alone(ids()[1:2, 50:])
        alone(ids()[2:])
    assert handle.calibrated_share == pytest.approx(other.calibrated_share, rel=0.02)


def test_what_is_always_kept_may_be_more_than_that():
    model, handle = calibrated(lists="carried", density=0.01)
    assert handle.calibrated_share == 1.0 and computed(model, handle) > 0.01


def test_until_then_the_share_is_the_options():
    model = tiny_model("llama")
    handle = swap_attention(model, "ast", {**OPTIONS, "share": 0.07})
    assert handle.calibrated_share == pytest.approx(0.07)
    adaptive = tiny_model("llama")
    swap_attention(adaptive, "ast", {**OPTIONS, "budget": "adaptive", "share": 0.07})
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, adaptive(ids()).logits)


def test_it_is_kept_with_the_weights():
    model, handle = calibrated(lists="carried", density=0.3)
    other = tiny_model("llama").eval()
    swap_attention(other, "ast", {**OPTIONS, "lists": "carried", "density": 0.3})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids()).logits, model(ids()).logits)
    assert sum(name.endswith("calibrated_share") for name in handle.state_dict()) == len(handle.slots)


def test_other_budgets_have_nothing_to_calibrate():
    model = tiny_model("llama")
    handle = swap_attention(model, "ast", {"budget": "adaptive", "block_size": 4})
    assert not handle.budget_is_calibrated and handle.calibrated_share is None
    notes = list(handle.notes)
    with torch.no_grad(), handle.budgeting():
        model(ids())
    assert handle.notes == notes and not any("calibrated" in name for name in handle.state_dict())


def test_a_calibration_that_fails_leaves_the_share_as_it_was():
    model = tiny_model("llama")
    handle = swap_attention(model, "ast", {**OPTIONS, "share": 0.07})
    with pytest.raises(KeyError), torch.no_grad(), handle.budgeting():
        model(ids())
        raise KeyError
    assert handle.calibrated_share == pytest.approx(0.07)
    assert all(slot.attention._counts is None for slot in handle.slots)
