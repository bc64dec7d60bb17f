"""Coarse tokens: every `stride` tokens of the keys and values pooled into one, for layers that look further back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from astbench_kernels import BlockLayout
from astbench_kernels.layout import ceil_div
from astbench_registry.block_selection.call import Call
from astbench_registry.mask import AttentionMask

COARSE_BLOCK = COARSE_GROUP = 64
"""Coarse keys per block, and query rows that share a list of them: all are listed, so only the tiles' size counts."""


class CoarseAttention(NamedTuple):
    """Attention of every query to the coarse tokens that it may see.

    Attributes:
        out: `(batch, num_heads, query_length, value_dim)`.
        lse: Log-sum-exp `(batch, num_heads, query_length)`, with the coarse tokens' weight in it.
        layout: Their lists.
        key_valid: Bool `(batch, windows)`: which are real; None when all are.
    """

    out: Tensor
    lse: Tensor
    layout: BlockLayout
    key_valid: Tensor | None


class CoarseKeys(nn.Module):
    """Attention to pooled keys and values, meant to be merged with attention to single ones.

    A coarse token is a weighted mean of `stride` consecutive ones, its weights a softmax over the places in the window,
    learned per key/value head and zero at first: the plain mean. It carries log(stride) on its logits, so that it
    weighs what it stands for, and under a causal mask it is seen once its last token is. Windows that are cut short
    by the end of the sequence, or hold padding, are left out: what is near is among the single keys anyway.
    """

    def __init__(self, stride: int, num_kv_heads: int) -> None:
        super().__init__()
        self.stride = stride
        self.key_pooling = nn.Parameter(torch.zeros(num_kv_heads, stride))
        self.value_pooling = nn.Parameter(torch.zeros(num_kv_heads, stride))

    def forward(self, call: Call, backend: str) -> CoarseAttention:
        """Attend.

        Args:
            call: Finite in padding too; its mask says what the queries see of the single keys.
            backend: Kernel.

        Cost: O(N M / stride) time, O(M / stride) memory beside the output.
        """
        windows, mask = call.k.shape[2] // self.stride, call.mask
        valid = None
        if mask.key_valid is not None:
            valid = mask.key_valid[:, : windows * self.stride].unflatten(1, (windows, self.stride)).all(-1)
        layout = every_coarse_block(call.q, windows, self.stride, mask)
        pooled = replace(
            call,
            k=self._pool(call.k, self.key_pooling),
            v=self._pool(call.v, self.value_pooling),
            mask=replace(mask, key_valid=valid),
        )
        out, lse = pooled.attend(layout, backend)
        return CoarseAttention(out, lse + math.log(self.stride), layout, valid)

    def _pool(self, x: Tensor, logits: Tensor) -> Tensor:
        windows = x.shape[2] // self.stride
        x = x[:, :, : windows * self.stride].unflatten(2, (windows, self.stride))
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(x.dtype)
        return torch.einsum("bhwsd,hs->bhwd", x, weights)

    def flops(
        self, batch: int, num_heads: int, query_length: int, key_length: int, head_dim: int, mask: AttentionMask
    ) -> int:
        """Two matmuls over the listed blocks, and the pooling."""
        windows, kv_heads = key_length // self.stride, self.key_pooling.shape[0]
        keys = int(listed_coarse_blocks(query_length, windows, self.stride, mask).sum()) * COARSE_BLOCK
        pooling = 4 * kv_heads * windows * self.stride * head_dim
        return batch * (4 * num_heads * keys * COARSE_GROUP * head_dim + pooling)


def every_coarse_block(q: Tensor, windows: int, stride: int, mask: AttentionMask) -> BlockLayout:
    """Lists of all coarse blocks that some row of a group may see.

    Args:
        q: Queries, `(batch, num_heads, query_length, head_dim)`.
        windows: Coarse keys, of which number `j` stands at position `(j + 1) * stride - 1`.
        stride: Tokens from one to the next.
        mask: What the queries see of the single keys.
    """
    batch, length = q.shape[0], q.shape[2]
    counts = listed_coarse_blocks(length, windows, stride, mask).to(q.device)
    blocks, groups = ceil_div(windows, COARSE_BLOCK), len(counts)
    return BlockLayout(
        indices=torch.arange(blocks, dtype=torch.int32, device=q.device).expand(batch, 1, groups, blocks),
        counts=counts.expand(batch, 1, groups),
        block_size=COARSE_BLOCK,
        query_group=COARSE_GROUP,
        query_length=length,
        key_length=windows,
        query_offset=mask.query_offset,
        key_stride=stride,
    )


def listed_coarse_blocks(query_length: int, windows: int, stride: int, mask: AttentionMask) -> Tensor:
    """int32 `(groups,)`: coarse blocks that the last row of each group sees a token of."""
    first, blocks = mask.query_offset // COARSE_GROUP, ceil_div(windows, COARSE_BLOCK)
    rows = mask.query_offset + query_length
    stop = (torch.arange(first, ceil_div(rows, COARSE_GROUP)) + 1) * COARSE_GROUP
    seen = stop.clamp(max=rows) // stride if mask.causal else torch.full_like(stop, windows)
    return (-(-seen // COARSE_BLOCK)).clamp(max=blocks).to(torch.int32)
