"""Scores of key blocks as products of two factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

SCORES_AT_A_TIME = 2**22
"""Scores of parts of blocks that are held at once."""


def block_scores(
    query: Tensor, key: Tensor, blocks: int | None = None, reach: Callable[[int], int] | None = None
) -> Tensor:
    """`(batch, heads, groups, d) . (batch, kv_heads, rows, d)` -> `(batch, heads, groups, blocks)`.

    Where there are several rows a block (their number is one block's by default), their logsumexp, a few groups at a
    time: all products at once would be a share of the N x M matrix.

    Args:
        query: The groups' side.
        key: The blocks' side.
        blocks: Their number.
        reach: Of the first n groups, how many blocks they may see at most; scores behind those are 0 where there are
            several rows a block. Default: all.
    """
    batch, heads, groups, _ = query.shape
    each = heads // key.shape[1]
    grouped, columns = query.unflatten(1, (key.shape[1], each)), key.transpose(-1, -2)
    if blocks is None or key.shape[2] == blocks:
        return torch.matmul(grouped.flatten(2, 3), columns).view(batch, heads, groups, key.shape[2])

    parts = key.shape[2] // blocks

    def some(rows: Tensor, stop: int) -> Tensor:
        products = torch.matmul(rows.flatten(2, 3), columns[..., : stop * parts])
        scores = products.unflatten(-1, (stop, parts)).logsumexp(-1)
        return pad(scores.view(batch, heads, rows.shape[3], stop), (0, blocks - stop))

    step = max(1, SCORES_AT_A_TIME // max(1, batch * heads * key.shape[2]))
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    scores = []
    for start in range(0, max(1, groups), step):
        rows = grouped[:, :, :, start : start + step]
        stop = blocks if reach is None else min(blocks, reach(start + rows.shape[3]))
        scores.append(checkpoint(some, rows, stop, use_reentrant=False) if learning else some(rows, stop))
    return torch.cat(scores, 2)
