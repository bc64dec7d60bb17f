"""The oracle: dense, quadratic, plain PyTorch in whatever dtype it is given (float64 included)."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_kernels.layout import BlockLayout


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    block_bias: Tensor | None,
    scale: float,
    causal: bool,
    key_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`; O(N x M) memory, gradients by autograd."""
    num_heads = q.shape[1]
    if key_valid is not None:
        # Memory outside the mask may hold anything, NaN included: replace it, for a product would keep it.
        k = k.masked_fill(~key_valid[:, None, :, None], 0.0)
        v = v.masked_fill(~key_valid[:, None, :, None], 0.0)
    k = k.repeat_interleave(num_heads // k.shape[1], 1)
    v = v.repeat_interleave(num_heads // v.shape[1], 1)
    layout = layout.expand_heads(num_heads)
    # Logits in float32 at least: half precision is for the inputs, not for the softmax.
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = torch.matmul(q.to(compute), k.to(compute).transpose(-1, -2)) * scale
    if block_bias is not None:
        bias = block_bias.repeat_interleave(num_heads // block_bias.shape[1], 1).to(compute)
        table = bias.new_zeros(*bias.shape[:3], layout.num_blocks + 1)
        index = torch.where(layout.slots, layout.indices, layout.num_blocks).long()
        table = table.scatter(-1, index, bias)[..., :-1]
        block_of_key = torch.arange(layout.key_length, device=q.device) // layout.block_size
        logits = logits + table[:, :, layout.row_groups()][..., block_of_key]
    keep = layout.token_mask(causal=causal, key_valid=key_valid)
    logits = torch.where(keep, logits, -torch.inf)
    blind = (logits.detach() == -torch.inf).all(-1)  # of these the gradient of a logsumexp would be NaN
    lse = torch.logsumexp(torch.where(blind.unsqueeze(-1), 0.0, logits), -1).masked_fill(blind, -torch.inf)
    # Divided by its own sum: where all logits are large, rounding lse would scale the row.
    weights = torch.exp(logits - lse.detach().masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return torch.matmul(weights, v.to(compute)).to(q.dtype), lse
