"""Parameters in half precision that are computed with in more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        limit = torch.finfo(ctx.dtype)
        return grad.clamp(limit.min, limit.max).to(ctx.dtype), None


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a wider dtype; its gradient is the largest number of its own dtype where that cannot hold it.

    Scores of blocks are products of a query with a key, and so is their gradient to the weights that make them. It
    passes float16's 65,504 for queries and keys at which dense attention's gradients are finite.
    """
    if weight.dtype == dtype:
        return weight
    if not torch.is_grad_enabled():
        return weight.to(dtype)
    wide: Tensor = _Widened.apply(weight, dtype)
    return wide
