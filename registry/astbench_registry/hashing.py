"""Noise that is a function of numbers: no generator, so padding, batch and order of calls cannot change it."""

from __future__ import annotations

import torch
from torch import Tensor


def hashed_uniform(seed: int, *parts: Tensor) -> Tensor:
    """float32 in [0, 1) for every combination of `parts`, integer tensors that broadcast against each other."""
    mixed = _mix(torch.tensor(seed, device=parts[0].device))
    for part in parts:
        mixed = _mix(mixed ^ part)
    return (mixed & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """One round of splitmix64's finaliser on int64, whose products wrap around."""
    x = x + 0x1E3779B97F4A7C15
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
