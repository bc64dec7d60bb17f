"""Scores of key blocks as products of two factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
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
    if query.device.type == "cpu":
        scores: Tensor = _InCache.apply(query, key, blocks, reach, pool)
        return scores
    return _in_pieces(query, key, blocks, reach, pool)


class _InCache(torch.autograd.Function):
    """The same for several rows a block on a CPU, with both gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, blocks: int, reach: Reach | None, pool: int) -> Tensor:
        """See :func:`block_scores`."""
        ctx.save_for_backward(query, key)
        ctx.options = blocks, reach, pool  # type: ignore[attr-defined]
        return _in_cache(query, key, blocks, reach, pool)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of both sides."""
        query, key = ctx.saved_tensors
        return *_gradients(query, key, grad, *ctx.options), None, None, None


def _in_pieces(query: Tensor, key: Tensor, blocks: int, reach: Reach | None, pool: int) -> Tensor:
    """A few groups at a time against all keys, made again for the gradients: few launches on a GPU."""
    batch, heads, groups, _ = query.shape
    kv_heads = key.shape[1]
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    parts = key.shape[2] // blocks
    grouped, columns = query.unflatten(1, (kv_heads, heads // kv_heads)), key.transpose(-1, -2)

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
    """Tile by tile, a tile's keys by its query rows.

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


def _gradients(
    query: Tensor, key: Tensor, grad: Tensor, blocks: int, reach: Reach | None, pool: int
) -> tuple[Tensor, Tensor]:
    """Of both sides, from products made anew; rows whose scores nothing learned from cost nothing.

    Distillation looks at a sample of rows, and the task's gradient reaches the rows that brought a block into a list:
    a small part of all.
    """
    kv_heads, parts = key.shape[1], key.shape[2] // blocks
    each, width = query.shape[1] // kv_heads, max(1, KEYS // parts)
    query_grad, key_grad = torch.zeros_like(query), torch.zeros_like(key)
    # By groups first, so that the rows of a tile see about as many blocks.
    sides = [x.unflatten(1, (kv_heads, each)).transpose(2, 3).flatten(0, 1) for x in (query, grad)]
    for index, (rows, row_grad, keys) in enumerate(zip(*sides, key.flatten(0, 1), strict=True)):
        place = divmod(index, kv_heads)
        wanted_rows = (row_grad != 0).any(-1).nonzero()
        for learned in wanted_rows.split(ROWS) if len(wanted_rows) else ():
            group, head = learned.unbind(1)
            some, wanted = rows[group, head], row_grad[group, head]
            scaled, some_grad = (some * LOG2_E).t().contiguous(), torch.zeros_like(some)
            stop = blocks if reach is None else min(blocks, reach(int(group[-1]) + 1))
            for first in range(0, stop, width):
                last = min(stop, first + width)
                part = slice(first * parts, last * parts)
                products = torch.mm(keys[part], scaled).view(last - first, parts // pool, pool, -1)
                weight = _product_weights(products).mul_(wanted[:, first:last].t()[:, None, None])
                weight = weight.view(-1, len(some))
                some_grad.addmm_(weight.t(), keys[part])
                key_grad[place][part].addmm_(weight, some)
            query_grad.view(query.shape[0], kv_heads, each, *query.shape[2:])[(*place, head, group)] = some_grad
    return query_grad, key_grad


def _product_weights(products: Tensor) -> Tensor:
    """Derivative of a block's score by each of its products to base 2, `(blocks, pools, of a pool, n)`."""
    best = products.amax(2, keepdim=True)
    weight = (best - best.amax(1, keepdim=True)).exp2_()
    weight.div_(weight.sum(1, keepdim=True))
    if products.shape[2] == 1:
        return weight
    largest = products == best  # equal ones share
    return largest * (weight / largest.sum(2, keepdim=True))


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
