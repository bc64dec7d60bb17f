"""Control: blocks by the attention mass they really hold. Quadratic: any selector's ceiling, no model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_registry.block_selection import BlockSelectingAttention, Call, Selection

ROWS_AT_A_TIME = 2**22
"""Logits held at once; the N x M matrix never is."""


class OracleTopKAttention(BlockSelectingAttention):
    """`s_ij` = dense attention mass on block j, summed over the rows of group i."""

    @torch.no_grad()
    def scores(self, call: Call, selection: Selection) -> Tensor:
        """See the base class. Time O(N M)."""
        q, k, mask, compute = call.q, call.k, call.mask, call.compute_dtype
        batch, heads, length, _ = q.shape
        key = k.to(compute).repeat_interleave(heads // k.shape[1], 1)
        valid = mask.valid_queries(length)
        position = torch.arange(k.shape[2], device=q.device)
        missing = selection.num_blocks * selection.block_size - k.shape[2]
        group = selection.query_group
        mass = []
        groups_at_a_time = max(1, ROWS_AT_A_TIME // max(1, batch * heads * k.shape[2] * group))
        for start in range(0, length, groups_at_a_time * group):
            rows = slice(start, min(length, start + groups_at_a_time * group))
            logits = torch.matmul(q[:, :, rows].to(compute), key.transpose(-1, -2)) * call.scale
            if mask.key_valid is not None:
                logits = logits.masked_fill(~mask.key_valid[:, None, None, :], -torch.inf)
            if mask.causal:
                row = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + mask.query_offset
                logits = logits.masked_fill(position > row, -torch.inf)
            weights = logits.softmax(-1).nan_to_num(0.0)  # rows that see nothing have no mass
            if valid is not None:
                weights = weights * valid[:, None, rows, None]
            weights = pad(weights, (0, missing)).unflatten(-1, (selection.num_blocks, -1)).sum(-1)
            weights = pad(weights, (0, 0, 0, -weights.shape[2] % group))
            mass.append(weights.unflatten(2, (-1, group)).sum(3))
        return torch.cat(mass, 2)
