"""Sample order: a pure function of (seed, epoch, step), shared out over processes."""

from types import SimpleNamespace

import pytest

from astbench.training.sampler import POOL_BATCHES, Draw, StepBatchSampler
from astbench.training.seeds import derived_seed

SIZE, BATCH = 53, 5


def trainer(step=0, accumulate=1, world=1, rank=0):
    return SimpleNamespace(global_step=step, accumulate_grad_batches=accumulate, world_size=world, global_rank=rank)


def sampler(size=SIZE, batch=BATCH, seed=3, lengths=None, first_epoch=None, **state):
    return StepBatchSampler(size, batch, seed, trainer(**state), lengths=lengths, first_epoch=first_epoch)


def run(steps, accumulate=1, start=0, **options):
    """The batches that a trainer draws from optimizer step `start` on, epoch after epoch."""
    drawn, step = [], start
    while len(drawn) < steps * accumulate:
        for batch in sampler(step=step, accumulate=accumulate, **options):
            drawn.append(batch)
        step = start + len(drawn) // accumulate
    return drawn[: steps * accumulate]


@pytest.mark.parametrize("lengths", [None, [(i * 7) % 13 for i in range(SIZE)]], ids=["plain", "by-length"])
@pytest.mark.parametrize("start", [1, 4, 9, 10, 11, 25, 40])
def test_a_resumed_run_draws_what_the_uninterrupted_one_would(start, lengths):
    whole = run(45, lengths=lengths)
    assert run(45 - start, start=start, lengths=lengths) == whole[start:]


def test_accumulation_counts_batches_not_steps():
    whole = run(20, accumulate=2)
    assert run(20 - 5, accumulate=2, start=5) == whole[10:]


def test_an_epoch_is_made_of_whole_steps():
    assert len(list(sampler(accumulate=4))) == 8  # of 10 batches: two are left for the next epochs
    assert len(list(sampler(accumulate=20))) == 20  # a set smaller than a step is repeated
    assert list(sampler(accumulate=4, step=1)) == list(sampler(accumulate=4))[4:]
    assert run(6, accumulate=4)[8:16] == run(2, accumulate=4, start=2)


def test_an_epoch_shows_each_example_at_most_once_and_all_but_a_rest():
    batches = list(sampler())
    assert len(batches) == SIZE // BATCH
    seen = [draw.example for batch in batches for draw in batch]
    assert len(seen) == len(set(seen)) == SIZE // BATCH * BATCH
    assert all(draw.epoch == 0 for batch in batches for draw in batch)


def test_order_depends_on_seed_and_epoch_only():
    assert sampler().order(2) == sampler(step=17).order(2)
    assert sampler().order(2) != sampler().order(3)
    assert sampler(seed=4).order(2) != sampler(seed=3).order(2)
    assert sorted(sampler().order(2)) == list(range(SIZE))


@pytest.mark.parametrize("size", [1, 4, 5, SIZE, 2 * POOL_BATCHES * BATCH + 13])
@pytest.mark.parametrize("world", [1, 2])
def test_order_by_length_is_a_permutation(size, world):
    lengths = [(i * 37) % 101 for i in range(size)]
    for epoch in range(3):
        assert sorted(sampler(size=size, lengths=lengths, world=world).order(epoch)) == list(range(size))


def test_order_by_length_puts_similar_lengths_together():
    size = POOL_BATCHES * BATCH
    lengths = [(i * 37) % 1009 for i in range(size)]

    def spread(**options):
        batches = list(sampler(size=size, **options))
        return sum(max(lengths[d.example] for d in b) - min(lengths[d.example] for d in b) for b in batches)

    assert spread(lengths=lengths) < spread() / 10
    # The batches themselves come in random order, not short to long.
    means = [sum(lengths[d.example] for d in b) for b in sampler(size=size, lengths=lengths)]
    assert means != sorted(means)


@pytest.mark.parametrize("lengths", [None, [(i * 7) % 13 for i in range(SIZE)]], ids=["plain", "by-length"])
def test_two_processes_share_the_same_big_batches(lengths):
    ranks = [list(sampler(world=2, rank=r, lengths=lengths)) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == SIZE // (2 * BATCH)
    seen = [draw.example for batches in ranks for batch in batches for draw in batch]
    assert len(seen) == len(set(seen))
    alone = [set(b) for b in sampler(batch=2 * BATCH, lengths=lengths)]
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == alone


def test_a_set_smaller_than_a_batch_is_repeated():
    (batch,) = list(sampler(size=3, batch=5))
    assert len(batch) == 5
    assert {draw.example for draw in batch} == {0, 1, 2}


def test_first_epoch_follows_the_curriculum():
    order = list(range(SIZE))[::-1]
    assert next(iter(sampler(first_epoch=order))) == [Draw(0, e) for e in order[:BATCH]]
    later = sampler(first_epoch=order, step=SIZE // BATCH)
    assert next(iter(later)) == [Draw(1, e) for e in later.order(1)[:BATCH]]


def test_derived_seeds_differ_and_fit():
    seeds = {derived_seed(a, b, c) for a in range(5) for b in range(50) for c in range(3)}
    assert len(seeds) == 5 * 50 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
