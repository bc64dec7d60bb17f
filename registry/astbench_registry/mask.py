"""What each query of a call may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from astbench_kernels.layout import visible_pairs
from astbench_registry.capabilities import Pattern


@dataclass(frozen=True)
class AttentionMask:
    """What each query may see, in O(batch x length), never an N x M tensor.

    Attributes:
        pattern: One of the four patterns. Under "causal_self" query row i stands at position
            `query_offset + i` and sees keys at positions up to its own. Under "causal_cross" it sees all
            keys, but the queries arrive one after the other, so none may use what a later one says.
        query_offset: Position of query row 0 (> 0 while decoding with a cache).
        key_valid: Bool `(batch, key_length)`, False for padding; None when every key is real.
        query_valid: Bool `(batch, query_length)`; for self-attention it follows from `key_valid`.
    """

    pattern: Pattern = "bidirectional_self"
    query_offset: int = 0
    key_valid: Tensor | None = None
    query_valid: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("key_valid", "query_valid"):
            valid = getattr(self, name)
            if valid is not None and (valid.dtype != torch.bool or valid.dim() != 2):
                raise ValueError(
                    f"{name} must be bool (batch, length), True for real tokens, got {valid.dtype} {tuple(valid.shape)}"
                )

    @property
    def causal(self) -> bool:
        """Keys after the query's position are hidden."""
        return self.pattern == "causal_self"

    @property
    def cross(self) -> bool:
        """Keys are another sequence than the queries."""
        return self.pattern.endswith("cross")

    @property
    def sequential(self) -> bool:
        """A query may not depend on later queries."""
        return self.pattern.startswith("causal")

    def valid_queries(self, query_length: int) -> Tensor | None:
        """Bool `(batch, query_length)` or None when every query is real."""
        if self.query_valid is not None or self.cross or self.key_valid is None:
            return self.query_valid
        return self.key_valid[:, self.query_offset : self.query_offset + query_length]

    def visible_pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """float64 `(batch,)`: the (query, key) pairs that a dense attention would compute."""
        return visible_pairs(
            q.shape[2],
            k.shape[2],
            causal=self.causal,
            query_offset=self.query_offset,
            key_valid=self.key_valid,
            batch=q.shape[0],
            device=q.device,
        )

    def without_padding(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(batch, heads, length, d)` with zeros where there is padding.

        Padding may hold anything, NaN included, and a weight of zero would keep a NaN. Queries too: nobody reads
        a padded row's output, but in the backward pass its gradient of zero, times NaN, would reach all keys.
        """
        if self.key_valid is not None:
            hidden = ~self.key_valid[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        return self.real_queries(q), k, v

    def real_queries(self, q: Tensor) -> Tensor:
        """The queries alone of :meth:`without_padding`."""
        valid = self.valid_queries(q.shape[2])
        return q if valid is None else q.masked_fill(~valid[:, None, :, None], 0.0)

    def visible_rows(self, rows: Tensor, query_length: int, key_length: int, batch: int) -> Tensor:
        """Bool `(batch, 1, rows, key_length)`: what some query rows may see; nothing for rows of padding.

        Args:
            rows: int64 `(rows,)`, of the queries.
            query_length: Of all queries.
            key_length: Of all keys.
            batch: Sequences.
        """
        seen = torch.ones(batch, 1, len(rows), key_length, dtype=torch.bool, device=rows.device)
        if self.causal:
            seen &= torch.arange(key_length, device=rows.device) <= (rows + self.query_offset)[:, None]
        if self.key_valid is not None:
            seen &= self.key_valid[:, None, None, :]
        valid = self.valid_queries(query_length)
        return seen if valid is None else seen & valid[:, None, rows, None]

    def dense(self, query_length: int, key_length: int, device: torch.device) -> Tensor | None:
        """Bool `(batch or 1, 1, query_length or 1, key_length)`, True = may be attended; None for everything.

        Cost: O(query_length x key_length) when causal.
        """
        mask = None
        if self.causal:
            position = torch.arange(query_length, device=device)[:, None] + self.query_offset
            mask = (torch.arange(key_length, device=device) <= position)[None, None]
        if self.key_valid is not None:
            padding = self.key_valid[:, None, None, :]
            mask = padding if mask is None else mask & padding
        return mask
