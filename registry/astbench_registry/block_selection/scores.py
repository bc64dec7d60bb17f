"""Scores of key blocks as products of two factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

LOG2_E = math.log2(math.e)

SCORES_AT_A_TIME = 2**22
"""Scores of parts of blocks that are held at once, on a GPU and while gradients are recorded."""

ROWS, KEYS = 96, 2048
"""Of a tile of such scores on a CPU, which stays in its cache: about so many query rows, keys of whole blocks."""

Reach = Callable[[int], int]
"""Of the first n groups, how many blocks they may see at most."""


def block_scores(
    query: Tensor, key: Tensor, blocks: int | None = None, reach: Reach | None = None, pool: int = 1
) -> Tensor:
    """`(batch, heads, groups, d) . (batch, kv_heads, rows, d)` -> `(batch, heads, groups, blocks)`.

    Where there are several rows a block (their number is one block's by default), their logsumexp, a few groups at a
    time: all products at once would be a share of the N x M matrix.

    Args:
        query: The groups' side.
        key: The blocks' side.
        blocks: Their number.
        reach: Scores behind these blocks are 0 where there are several rows a block. Default: all are computed.
        pool: Consecutive rows of a block of which only the largest product joins that sum; a divisor of their number.
    """
    batch, heads, groups, _ = query.shape
    each = heads // key.shape[1]
    if blocks is None or key.shape[2] == blocks:
        grouped = query.unflatten(1, (key.shape[1], each)).flatten(2, 3)
        return torch.matmul(grouped, key.transpose(-1, -2)).view(batch, heads, groups, key.shape[2])
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if query.device.type == "cpu" and not learning:
        return _in_cache(query, key, blocks, reach, pool)
    parts = key.shape[2] // blocks
    grouped, columns = query.unflatten(1, (key.shape[1], each)), key.transpose(-1, -2)

    def some(rows: Tensor, stop: int) -> Tensor:
        products = torch.matmul(rows.flatten(2, 3), columns[..., : stop * parts])
        scores = products.unflatten(-1, (stop, parts // pool, pool)).amax(-1).logsumexp(-1)
        return pad(scores.view(batch, heads, rows.shape[3], stop), (0, blocks - stop))

    step = max(1, SCORES_AT_A_TIME // max(1, batch * heads * key.shape[2]))
    scores = []
    for start in range(0, max(1, groups), step):
        rows = grouped[:, :, :, start : start + step]
        stop = blocks if reach is None else min(blocks, reach(start + rows.shape[3]))
        scores.append(checkpoint(some, rows, stop, use_reentrant=False) if learning else some(rows, stop))
    return torch.cat(scores, 2)


def _in_cache(query: Tensor, key: Tensor, blocks: int, reach: Reach | None, pool: int) -> Tensor:
    """The same for several rows a block, without a graph: tile by tile, a tile's keys by its query rows.

    In that order sums and maxima over a block's keys are of whole vectors.
    """
    batch, heads, groups, dim = query.shape
    kv_heads, parts = key.shape[1], key.shape[2] // blocks
    each = heads // kv_heads
    scores = query.new_zeros(batch * kv_heads, each, groups, blocks)
    step, width = max(1, ROWS // each), max(1, KEYS // parts)
    products = query.new_empty(width * parts, step * each)
    each_rows = query.reshape(batch * kv_heads, each, groups, dim)
    each_keys = key.reshape(batch * kv_heads, key.shape[2], dim)
    for out, rows, keys in zip(scores, each_rows, each_keys, strict=True):
        for start in range(0, groups, step):
            some = (rows[:, start : start + step].flatten(0, 1) * LOG2_E).t().contiguous()
            stop = blocks if reach is None else min(blocks, reach(start + some.shape[1] // each))
            for first in range(0, stop, width):
                last = min(stop, first + width)
                tile = products.flatten()[: (last - first) * parts * some.shape[1]].view(-1, some.shape[1])
                torch.mm(keys[first * parts : last * parts], some, out=tile)
                found = _pooled(tile.view(last - first, parts, -1), pool)
                out[:, start : start + step, first:last] = found.view(last - first, each, -1).permute(1, 2, 0)
    return scores.view(batch, heads, groups, blocks)


def _pooled(products: Tensor, pool: int) -> Tensor:
    """Products `(blocks, rows of a block, n)` to base 2 -> scores `(blocks, n)`; may write into `products`."""
    blocks, parts, n = products.shape
    if pool > 1:
        products = products.view(blocks, parts // pool, pool, n).amax(2)
    highest = products.amax(1, keepdim=True)
    if parts == pool:
        return highest.squeeze(1) / LOG2_E
    # exp2 takes a third to a half of exp's time.
    return products.sub_(highest).exp2_().sum(1).log2_().add_(highest.squeeze(1)).div_(LOG2_E)
