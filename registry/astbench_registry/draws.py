"""Random numbers of the variants that draw some: a function of named integers, never of the global state."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by these integers, in this order (seed, layer, step, ...); the global one is untouched.

    A sum of the parts would give seed 0 at step 1 the numbers of seed 1 at step 0; a hash does not. On the CPU
    always, so that every device gets the same numbers.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
