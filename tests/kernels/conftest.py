"""Triton kernels where there is no GPU: interpreted, on memory that holds no luck."""

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels are interpreted where there is no GPU; nothing that they should have written is left to luck."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        interpret_bfloat16(monkeypatch)
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(torch.nan if x.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def interpret_bfloat16(monkeypatch):
    """The interpreter holds bfloat16 numbers as their bits and multiplies those; here it multiplies the numbers."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def numbers(x):
        if x.dtype.scalar != language.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, numbers(a), numbers(b), *rest)
    )
