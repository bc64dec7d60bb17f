"""Softmax weights written out, some query rows at a time: what transforms of attention weights work on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from astbench_kernels import BlockLayout
from astbench_registry.mask import AttentionMask

Rows = Callable[[Tensor], Tensor]
"""Query rows, int64 `(rows,)`, to what is asked of them."""


def softmax_rows(q: Tensor, k: Tensor, mask: AttentionMask, scale: float | None, pattern: Rows | None = None) -> Rows:
    """Softmax attention over the visible pairs, or those of a pattern, as :class:`ExplicitWeights` takes it.

    Args:
        q: Queries `(batch, heads, query_length, head_dim)`; padding may hold anything.
        k: Keys `(batch, kv_heads, key_length, head_dim)`, likewise.
        mask: What may be seen.
        scale: Factor on q . k; 1/sqrt(head_dim) by default.
        pattern: Rows to bool, broadcastable to `(batch, heads, rows, key_length)`: True where a pair is attended to,
            whatever the mask hides. None: everywhere.

    Cost: O(rows x key_length) time and memory a call.
    """
    wide = torch.promote_types(q.dtype, torch.float32)  # half precision would round logits and weights
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, _ = mask.without_padding(q, k, k)
    q, k = q.to(wide), k.to(wide)

    def of(rows: Tensor) -> Tensor:
        grouped = q[:, :, rows].unflatten(1, (k.shape[1], -1))  # (batch, kv_heads, heads each, rows, d)
        logits = (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2).mul_(factor)
        allowed = mask.visible_rows(rows, q.shape[2], k.shape[2], q.shape[0])
        if pattern is not None:
            allowed = allowed & pattern(rows)
        return logits.masked_fill_(~allowed, torch.finfo(wide).min).softmax(-1).masked_fill_(~allowed, 0.0)

    return of


def listed_rows(layout: BlockLayout, heads: int) -> Rows:
    """Rows to bool `(batch, heads, rows, key_length)`: keys in the blocks that each row's list holds.

    Args:
        layout: Its lists; carried ones grow along their rows.
        heads: Query heads, some of which may share a list.
    """
    layout = layout.expand_heads(heads)
    first, group, offset = layout.first_rows(), layout.row_groups(), layout.row_offsets()
    block = torch.arange(layout.key_length, device=first.device) // layout.block_size

    def of(rows: Tensor) -> Tensor:
        return (first[:, :, group[rows]] <= offset[rows][:, None])[..., block]

    return of
