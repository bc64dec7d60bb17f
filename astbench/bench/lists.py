"""Lists of key blocks for the kernel alone, and the work that a call on given lists is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench.errors import ConfigError
from astbench_kernels import BlockLayout
from astbench_registry.block_selection import BlockSelector, Call, Selection
from astbench_registry.mask import AttentionMask

TRAINING = 3.5
"""Matmuls of a forward and a backward pass over those of a forward pass: 2 and 5 for 2."""


def every_block(q: Tensor, k: Tensor, offset: int) -> BlockLayout:
    """Dense attention as lists: one block of all keys."""
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    indices = torch.zeros(batch, 1, 1, 1, dtype=torch.int32, device=q.device)
    return BlockLayout(indices, torch.ones_like(indices[..., 0]), keys, offset + rows, rows, keys, offset)


def random_lists(selector: BlockSelector, call: Call, *, uneven: bool) -> BlockLayout:
    """Lists as the attention would choose them for random scores: its budget, its always-kept blocks.

    Args:
        selector: The attention's, whose options say how many blocks are kept.
        call: Queries, keys, and what is visible.
        uneven: Spread the blocks over a head's lists by log-normal weights (sigma 1: the longest of 256 lists has
            some ten times the mean, as far as so many blocks are visible) instead of evenly. What is always kept and
            what is visible bound every list, so that the total is another one: compare times for each pair.

    Raises:
        ConfigError: the attention's lists are carried: random choices of a tile's rows would have nearly all blocks.

    Cost: O(groups x blocks) memory for one head at a time, beside the lists.
    """
    if selector.tile(call.mask) is not None:
        raise ConfigError("--lists draws lists that are not carried; set --attention.lists=own, or leave --lists out")
    selection = selector.selection(call)
    (batch, heads), device = call.q.shape[:2], call.q.device
    lists = []
    for _ in range(batch * heads):
        budget = selector.budget(selection.visible.sum(-1))
        if uneven:
            budget = _spread(budget, selection)
        scores = torch.rand(1, 1, selection.num_groups, selection.num_blocks, device=device)
        lists.append(selection.layout(selector.best(scores, selection, budget), call))
    width = max(one.indices.shape[-1] for one in lists)
    padded = [torch.nn.functional.pad(one.indices, (0, width - one.indices.shape[-1])) for one in lists]
    return BlockLayout(
        torch.cat(padded).view(batch, heads, selection.num_groups, width),
        torch.cat([one.counts for one in lists]).view(batch, heads, selection.num_groups),
        selection.block_size,
        selection.query_group,
        call.q.shape[2],
        call.k.shape[2],
        call.mask.query_offset,
    )


def _spread(budget: Tensor, selection: Selection) -> Tensor:
    weight = torch.randn(budget.shape, device=budget.device).exp()
    wanted = (weight * (budget.sum() / weight.sum())).round().long()
    return torch.minimum(torch.maximum(wanted, selection.always_kept.sum(-1)), selection.visible.sum(-1))


def work(mode: str, q: Tensor, k: Tensor, layout: BlockLayout, mask: AttentionMask) -> dict[str, float]:
    """What a call on these lists is worth, counted.

    Args:
        mode: forward, training or decode.
        q: Queries, `(batch, heads, query_length, head_dim)`.
        k: Keys, `(batch, kv_heads, key_length, head_dim)`; values are of the same size.
        layout: The lists.
        mask: Causal or not.

    Returns:
        `density`, of the visible pairs; `work_flops`, kept pairs x 4 head_dim, in training x `TRAINING`;
        `least_bytes`: queries, keys, values and output moved once; in training they, the output's gradient and those
        of the inputs as a forward and a backward pass read and write them; in decode of keys and values only the
        blocks that some query head of theirs has chosen.
    """
    heads = q.shape[1] // layout.indices.shape[1]
    pairs = heads * float(layout.attended_pairs(causal=mask.causal).sum())
    visible = q.shape[1] * float(mask.visible_pairs(q, k).sum())
    flops = 4 * q.shape[-1] * pairs
    numbers = 2 * (q.numel() + k.numel())
    if mode == "training":
        flops *= TRAINING
        numbers *= 3  # forward 2 + 2, backward 4 + 4: queries, output and their gradients; keys, values and theirs
    elif mode == "decode":
        numbers = 2 * q.numel() + 2 * _distinct_keys(layout, k) * k.shape[-1]
    return {"density": pairs / visible, "work_flops": flops, "least_bytes": float(numbers * q.element_size())}


def _distinct_keys(layout: BlockLayout, k: Tensor) -> int:
    """Keys in blocks that some list of their key/value head names, over batch and heads."""
    batch, kv_heads = k.shape[:2]
    keep = layout.to_mask().any(2)  # (batch, lists, blocks)
    lists = keep.shape[1]
    if lists > kv_heads:
        keep = keep.view(batch, kv_heads, lists // kv_heads, -1).any(2)
    start = torch.arange(layout.num_blocks, device=k.device) * layout.block_size
    size = (layout.key_length - start).clamp(max=layout.block_size)
    return int((keep * size).sum()) * (kv_heads // keep.shape[1])
