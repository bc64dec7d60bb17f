"""Dense attention weights, some rows at a time: what selectors learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.scores import block_scores

WEIGHTS_AT_A_TIME, WEIGHTS_AT_A_TIME_ON_GPU = 2**19, 2**26
"""Held together: 2 MiB, near a core's cache; 256 MiB (not measured) where every step is a launch."""


@torch.no_grad()
def dense_weights(call: Call, rows: Tensor, *, stop: int | None = None) -> Tensor:
    """Softmax attention of some query rows over all keys that they see.

    Args:
        call: Finite in padding too.
        rows: int64 `(rows,)`: which of the queries, the same of every sequence.
        stop: How many keys are looked at, from the first on, for rows that see no others; all by default.

    Returns:
        `(batch, num_heads, rows, key_length or stop)`, float32 or more, without gradient; zero in rows that see nothing
        and in rows of padding.

    Cost: O(rows x key_length) time and memory.
    """
    q, k, mask, compute = call.q, call.k[:, :, :stop], call.mask, call.compute_dtype
    weights = block_scores(q[:, :, rows].to(compute), k.to(compute)).mul_(call.scale)
    if mask.key_valid is not None:
        weights.masked_fill_(~mask.key_valid[:, None, None, :stop], -torch.inf)
    if mask.causal:
        position = torch.arange(k.shape[2], device=q.device)
        weights.masked_fill_(position > (rows + mask.query_offset)[:, None], -torch.inf)
    weights = weights.softmax(-1).nan_to_num_(0.0)
    valid = mask.valid_queries(q.shape[2])
    return weights if valid is None else weights.mul_(valid[:, None, rows, None])


def rows_at_a_time(q: Tensor, k: Tensor) -> int:
    """Query rows whose dense weights may be held together."""
    weights = WEIGHTS_AT_A_TIME if q.device.type == "cpu" else WEIGHTS_AT_A_TIME_ON_GPU
    return max(1, weights // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
