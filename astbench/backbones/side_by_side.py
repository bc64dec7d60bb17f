"""One new token of each of several sequences in one forward pass, each sequence with a KV cache of its own.

What is done token by token (projections, feed-forward) is done for all of them together; each attends alone, exactly as
it would in a pass of its own. So no sequence is padded, sequences may come and go between two passes, and what a
variant keeps beside a cache (summaries of blocks, carried lists) stays with its sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True)
class NewTokens:
    """Keys and values that no cache holds yet, in the place of all keys and of all values.

    Attributes:
        keys: `(sequences, kv_heads, 1, head_dim)`.
        values: `(sequences, kv_heads, 1, value_dim)`.
        caches: One a sequence.
        layer: Which of their layers.
    """

    keys: Tensor
    values: Tensor
    caches: Sequence[Cache]
    layer: int

    def append(self, row: int) -> tuple[Tensor, Tensor]:
        """All keys and values of one sequence, `(1, kv_heads, length, ...)`, the new ones now in its cache."""
        one = slice(row, row + 1)
        found: tuple[Tensor, Tensor] = self.caches[row].update(self.keys[one], self.values[one], self.layer)
        return found


class SideBySide(Cache):
    """The caches of several sequences, for one pass of a model with a swapped attention.

    The model is called with `input_ids` `(sequences, 1)` and `position_ids` of the same shape, no mask and this as
    `past_key_values`. Its attention hook (:func:`astbench.backbones.hooks.attention_forward`) does the rest.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        super().__init__(layers=[DynamicLayer() for _ in caches[0].layers])
        self.caches = list(caches)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[NewTokens, NewTokens]:
        """What the hook needs to append to each cache, twice."""
        new = NewTokens(key_states, value_states, self.caches, layer_idx)
        return new, new
