"""Where there is no GPU, Triton is loaded for its interpreter, before anything else imports it to compile.

The variable is gone again at once: commands that tests start, and `choose_backend`, see the environment as it is.
"""

import gc
import os
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

gc.disable()  # until all tests are found: modules and tests are no garbage, and looking through them takes 12 s

if find_spec("triton") is not None and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


def pytest_make_parametrize_id(config, val, argname):
    """No test is named by bytes: an archive's hold the time it was made at, and each worker would name it anew."""
    return argname if isinstance(val, bytes) else None


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.fixture
def largest_tensor():
    """`with largest_tensor() as largest: ...; largest.elements`."""
    return LargestTensor
