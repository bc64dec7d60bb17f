"""Random numbers that are a function of named integers: never of the global state, the batch or the order of calls."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by these integers, in this order (seed, layer, step, ...); the global one is untouched.

    A sum of the parts would give seed 0 at step 1 the numbers of seed 1 at step 0; a hash does not. On the CPU
    always, so that every device gets the same numbers.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


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
