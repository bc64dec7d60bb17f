"""From block scores to a layout, and the gradient that goes with it."""

from __future__ import annotations

import torch
from torch import Tensor


def select_blocks(scores: Tensor, *, forced: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:
    """Keep the forced blocks and fill each row up to its budget with the best-scoring candidates.

    Args:
        scores: `(batch, heads, groups, key_blocks)`; compared in float32 (bf16 flips choices).
        forced: Bool, broadcastable to `scores`: always kept.
        candidates: Bool, broadcastable: may be kept. A block in neither never is.
        budget: int, broadcastable to `(batch, heads, groups)`: blocks to keep in all, forced ones included.

    Returns:
        Bool of the shape of `scores`. Ties go to the lower block number.

    Cost: O(groups x key_blocks log key_blocks).
    """
    forced = forced.expand_as(scores)
    candidates = candidates.expand_as(scores) & ~forced
    free = (budget - forced.sum(-1)).clamp(min=0)
    ranked = scores.float().masked_fill(~candidates, -torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[-1], device=scores.device)
    chosen = torch.zeros_like(candidates).scatter_(-1, order, place < free.unsqueeze(-1))
    return forced | (chosen & candidates)


def soft_top_k(scores: Tensor, k: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of a differentiable top-k: `p = sigmoid((s - tau) / T)` with `sum(p) = k`.

    tau is found by bisection and Newton's method without a graph; its gradient is put back by the implicit function
    theorem (`d tau / d s_j = w_j`, `w = p(1-p) / sum p(1-p)`), so that raising one score lowers the others' p.

    Args:
        scores: `(..., key_blocks)`, finite on candidates.
        k: `(...)`, how many of the candidates; rows with `k <= 0` or `k >= number of candidates` hold no
            choice and get log-probability 0 and no gradient.
        candidates: Bool `(..., key_blocks)`.
        temperature: T > 0, in the units of the scores.

    Returns:
        `log p`, float32 (float64 for float64 scores), zero outside the candidates.

    Source: Amos, Koltun and Kolter 2019 (The Limited Multi-Label Projection Layer, arXiv 1906.08707), eq. 3:
        the same projection, reached by bisection.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    live = (k > 0) & (k < candidates.sum(-1))
    mask = candidates & live.unsqueeze(-1)
    with torch.no_grad():
        # In units of the temperature, and -inf where there is no choice: sigmoid(-inf) = 0 stays out of every sum.
        values = (scores.detach() / temperature).masked_fill(~mask, -torch.inf)
        high = values.amax(-1, keepdim=True) + 30
        low = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True) - 30
        low, high = low.masked_fill(~live.unsqueeze(-1), -1.0), high.masked_fill(~live.unsqueeze(-1), 1.0)
        target = k.unsqueeze(-1)
        # Bisection until Newton is safe; Newton's error squares with every pass.
        for _ in range(12):
            middle = (low + high) / 2
            too_many = (values - middle).sigmoid_().sum(-1, keepdim=True) > target
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        tau = (low + high) / 2
        for _ in range(4 if scores.dtype == torch.float32 else 7):
            p = (values - tau).sigmoid_()
            slope = (p * (1 - p)).sum(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny)
            # Never out of the bracket, wherever a flat slope points.
            tau = (tau + (p.sum(-1, keepdim=True) - target) / slope).clamp(low, high)
        p = (values - tau).sigmoid_()
        weight = p * (1 - p)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    safe = torch.where(mask, scores, 0.0)
    # The weights sum to one: in value this adds nothing, in gradient it is the implicit function theorem's.
    tau = tau * temperature + (weight * (safe - safe.detach())).sum(-1, keepdim=True)
    return torch.nn.functional.logsigmoid((safe - tau) / temperature).masked_fill(~mask, 0.0)
