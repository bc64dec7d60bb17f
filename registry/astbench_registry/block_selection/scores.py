"""Scores of key blocks as products of two factors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES_AT_A_TIME = 2**22
"""Scores of parts of blocks that are held at once."""


def block_scores(query: Tensor, key: Tensor, blocks: int | None = None) -> Tensor:
    """`(batch, heads, groups, d) . (batch, kv_heads, rows, d)` -> `(batch, heads, groups, blocks)`.

    Where there are several rows a block (their number is one block's by default), their logsumexp, a few groups at a
    time: all products at once would be a share of the N x M matrix.
    """
    batch, heads, groups, _ = query.shape
    each = heads // key.shape[1]
    grouped, columns = query.unflatten(1, (key.shape[1], each)), key.transpose(-1, -2)
    if blocks is None or key.shape[2] == blocks:
        return torch.matmul(grouped.flatten(2, 3), columns).view(batch, heads, groups, key.shape[2])

    parts = key.shape[2] // blocks

    def some(rows: Tensor) -> Tensor:
        scores = torch.matmul(rows.flatten(2, 3), columns).unflatten(-1, (blocks, parts)).logsumexp(-1)
        return scores.view(batch, heads, rows.shape[3], blocks)

    step = max(1, SCORES_AT_A_TIME // max(1, batch * heads * key.shape[2]))
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    scores = [
        checkpoint(some, rows, use_reentrant=False) if learning else some(rows) for rows in grouped.split(step, 3)
    ]
    return torch.cat(scores, 2)
