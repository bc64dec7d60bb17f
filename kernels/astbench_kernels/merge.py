"""One softmax over several sets of keys, each attended to by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of disjoint sets of keys, from the attention over each of them.

    A bias that all keys of a set share is added to that set's log-sum-exp. Fine keys beside coarse ones that stand for
    `s` tokens each are thus two calls of :func:`astbench_kernels.block_sparse_attention`, the second with a layout of
    `key_stride=s`, and `merge_attention([(out, lse), (coarse_out, coarse_lse + math.log(s))])`.

    Args:
        parts: Of each set the output `(..., value_dim)` and the log-sum-exp of the logits `(...)`; a row of a set that
            saw nothing is zero with log-sum-exp -inf.

    Returns:
        Output in the dtype of the first part's, and log-sum-exp, in float32 (float64 for float64 outputs). A row that
        saw nothing in any set is zero with log-sum-exp -inf. Both are differentiable in all outputs and log-sum-exps,
        with gradient 0 where a row saw nothing.

    Raises:
        ValueError: no parts, or shapes that do not fit together.

    Cost: O(outputs) time; beside the result and the gradients, memory for one output.

    Source: Dao et al. 2022, arXiv 2205.14135, section 3.1: the decomposition of the softmax.
    """
    shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in parts]
    if not shapes or any(shape != (shapes[0][0], shapes[0][0][:-1]) for shape in shapes):
        raise ValueError(f"parts must be one or more (out, lse) of shapes (..., value_dim) and (...), got {shapes}")
    dtype = parts[0][0].dtype
    compute = torch.promote_types(dtype, torch.float32)
    lses = torch.stack([lse.to(compute) for _, lse in parts])
    # Only against overflow: the result does not depend on it. Rows that saw nothing: exp(-inf - 0) = 0.
    pivot = lses.detach().amax(0)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    weights = (lses - pivot).exp()
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    shares = (weights / total).unsqueeze(-1)
    merged = shares[0] * parts[0][0]
    for share, (out, _) in zip(shares[1:], parts[1:], strict=True):
        merged = torch.addcmul(merged, share, out)
    return merged.to(dtype), (pivot + total.log()).masked_fill(nothing, -torch.inf)
