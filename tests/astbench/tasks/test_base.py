"""What all data modules share: the limit of open files, which the loader's processes need."""

import os
import resource

import pytest

from astbench.errors import SystemRefusal
from astbench.tasks.base import FILES_PER_WORKER, TaskData


class Numbers(TaskData):
    num_workers = 2


@pytest.fixture
def limit(monkeypatch):
    """Stands for the system's limit: `[soft, hard]`."""
    now = [0, 0]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: now.__setitem__(slice(2), limits))
    return now


def test_a_limit_that_the_loaders_processes_would_meet_is_refused_before_they_start(limit):
    """A process that meets it drops its batch without a word, and the run waits for it for ever."""
    limit[:] = [39, 39]
    with pytest.raises(SystemRefusal, match=r"--data.num_workers=2 needs about \d+ open files, and 39 are allowed"):
        Numbers("demo").loader(list(range(4)))


def test_a_limit_that_may_be_raised_is_raised_as_far_as_needed(limit):
    limit[:] = [39, 4096]
    loader = Numbers("demo").loader(list(range(4)))
    assert 2 * FILES_PER_WORKER < limit[0] < 2 * FILES_PER_WORKER + 500 and limit[1] == 4096
    kept = list(limit)
    Numbers("demo").loader(list(range(4)))
    assert limit == kept and loader.num_workers == 2


@pytest.mark.parametrize("soft", [100_000, resource.RLIM_INFINITY])
def test_a_limit_that_is_high_enough_stays(limit, soft):
    limit[:] = [soft, resource.RLIM_INFINITY]
    Numbers("demo").loader(list(range(4)))
    assert limit[0] == soft


def test_without_processes_no_limit_is_asked(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", None)
    data = Numbers("demo")
    data.num_workers = 0
    assert list(data.loader(list(range(4)), batch_size=2).dataset) == [0, 1, 2, 3]
    assert os.path.isdir("/dev/fd")
