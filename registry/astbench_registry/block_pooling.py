"""What a block of keys is summed up by: the mean, the maximum and the minimum of its real rows."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.block_selection import Grid, block_mean, in_blocks, valid_in_blocks
from astbench_registry.interface import AttentionMask


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


def extremes_of_blocks(x: Tensor, mask: AttentionMask, grid: Grid) -> tuple[Tensor, Tensor]:
    """Maximum and minimum over each block's real keys, channel by channel, zero where there is none.

    Arguments and shapes as :func:`mean_of_blocks`.
    """
    wide = in_blocks(x.to(torch.promote_types(x.dtype, torch.float32)), grid.num_blocks, grid.block_size)
    hidden = ~real_in_blocks(x, mask, grid)[:, None, :, :, None]
    empty = hidden.all(3)
    high = wide.masked_fill(hidden, -torch.inf).amax(3).masked_fill(empty, 0.0)
    low = wide.masked_fill(hidden, torch.inf).amin(3).masked_fill(empty, 0.0)
    return high, low


def real_in_blocks(x: Tensor, mask: AttentionMask, grid: Grid) -> Tensor:
    """Bool `(batch or 1, blocks, block_size)`: rows that are neither padding nor behind the end."""
    valid = mask.key_valid
    if valid is None:
        valid = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    return valid_in_blocks(valid, grid.num_blocks, grid.block_size)
