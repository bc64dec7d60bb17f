"""Rows by blocks, and what a block is summed up by: the mean, the maximum and the minimum of its real rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.triton import pool_blocks
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.grid import Grid
from astbench_registry.mask import AttentionMask


def mean_of_blocks(x: Tensor, mask: AttentionMask, grid: Grid) -> Tensor:
    """Mean of each block's real keys or values, zero where there is none.

    Args:
        x: `(batch, kv_heads, key_length, d)`, zero in padding.
        mask: What is padding.
        grid: The blocks.

    Returns:
        `(batch, kv_heads, blocks, d)`, float32 or more.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return block_mean(in_blocks(wide, grid.num_blocks, grid.block_size), real_in_blocks(x, mask, grid))


def mean_keys(call: Call, grid: Grid, *, fused: bool) -> Tensor:
    """:func:`mean_of_blocks` of a call's keys; `fused`: by the Triton kernel."""
    if fused:
        return pool_blocks(call.k, call.k, call.mask.key_valid, grid.block_size).mean_key
    return mean_of_blocks(call.k, call.mask, grid)


def extremes_of_blocks(x: Tensor, mask: AttentionMask, grid: Grid) -> tuple[Tensor, Tensor]:
    """Maximum and minimum over each block's real keys, channel by channel, zero where there is none.

    Arguments and shapes as :func:`mean_of_blocks`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask.key_valid is None:  # Masking would copy the keys twice, ten times the work.
        return _over_blocks(wide, grid.block_size, torch.amax), _over_blocks(wide, grid.block_size, torch.amin)
    wide = in_blocks(wide, grid.num_blocks, grid.block_size)
    hidden = ~real_in_blocks(x, mask, grid)[:, None, :, :, None]
    empty = hidden.all(3)
    high = wide.masked_fill(hidden, -torch.inf).amax(3).masked_fill(empty, 0.0)
    low = wide.masked_fill(hidden, torch.inf).amin(3).masked_fill(empty, 0.0)
    return high, low


def _over_blocks(x: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """`(batch, heads, length, d)` -> `(batch, heads, blocks, d)`; the last block may be cut short."""
    whole = x.shape[2] // size
    blocks = reduce(x[:, :, : whole * size].unflatten(2, (whole, size)), dim=3)
    if whole * size == x.shape[2]:
        return blocks
    return torch.cat([blocks, reduce(x[:, :, whole * size :], dim=2, keepdim=True)], 2)


def real_in_blocks(x: Tensor, mask: AttentionMask, grid: Grid) -> Tensor:
    """Bool `(batch or 1, blocks, block_size)`: rows that are neither padding nor behind the end."""
    valid = mask.key_valid
    if valid is None:
        valid = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    return valid_in_blocks(valid, grid.num_blocks, grid.block_size)


def in_blocks(x: Tensor, blocks: int, size: int) -> Tensor:
    """`(batch, heads, length, d)` -> `(batch, heads, blocks, size, d)`, zeros behind the end."""
    missing = blocks * size - x.shape[2]
    return (pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (blocks, size))


def valid_in_blocks(valid: Tensor, blocks: int, size: int) -> Tensor:
    """Bool `(batch, length)` -> `(batch, blocks, size)`, False behind the end."""
    return pad(valid, (0, blocks * size - valid.shape[1])).unflatten(1, (blocks, size))


def block_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over each block's valid rows, zero where there is none; `x` is zero on the others.

    Args:
        x: From :func:`in_blocks`.
        valid: From :func:`valid_in_blocks`.
    """
    return x.sum(3) / valid.sum(-1)[:, None, :, None].clamp(min=1)


def first_valid(valid: Tensor, groups: int, size: int) -> Tensor:
    """int64 `(batch, groups)`: row of each group's first valid query; its first row where there is none."""
    within = valid_in_blocks(valid, groups, size).to(torch.uint8).argmax(-1)
    return torch.arange(groups, device=valid.device) * size + within
