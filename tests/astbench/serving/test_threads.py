"""The main thread gets no helpers: the model runs beside it."""

import threading

import pytest
import torch

from astbench.serving.threads import one_thread


def test_one_thread_within_and_as_many_as_before_behind():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        seen = []
        thread = threading.Thread(target=lambda: seen.append((torch.ones(2**16).sum(), torch.get_num_threads())))
        thread.start()
        thread.join()
        assert seen[0][1] == 2, "the engine's thread has as many as were asked for"
    finally:
        torch.set_num_threads(before)
