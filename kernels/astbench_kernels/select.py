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

    Cost: O(groups x key_blocks log budget).
    """
    forced = forced.expand_as(scores)
    allowed = forced | candidates
    budget = budget.expand(scores.shape[:-1])
    # Forced blocks rank above all others, so that the budget counts them too.
    ranked = scores.float().masked_fill(~allowed, -torch.inf).masked_fill_(forced, torch.inf)
    lowest = _lowest_kept(ranked, budget, allowed).unsqueeze(-1)
    kept = (ranked >= lowest).logical_and_(allowed)
    tied = kept.sum(-1) > budget.maximum(forced.sum(-1))
    if bool(tied.any()):
        kept[tied] = _without_surplus(ranked[tied], lowest[tied], budget[tied]) & kept[tied]
    return kept.logical_and_((budget > 0).unsqueeze(-1)).logical_or_(forced)


ROWS_AT_A_TIME = 512
"""Groups whose thresholds are looked for together. Under a causal mask the first ones see few blocks: short rows."""


def _lowest_kept(ranked: Tensor, budget: Tensor, allowed: Tensor) -> Tensor:
    """`(batch, heads, groups)`: the score of each row's budget-th best block, -inf where it has fewer."""
    if ranked.numel() == 0:
        return ranked.new_empty(ranked.shape[:-1])
    parts = []
    for rows in torch.arange(ranked.shape[2], device=ranked.device).split(ROWS_AT_A_TIME):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        blocks = allowed[:, :, here].flatten(0, 2).any(0).nonzero()
        reach = int(blocks[-1]) + 1 if len(blocks) else 1
        wanted = budget[:, :, here].clamp(1, reach)
        best = ranked[:, :, here, :reach].topk(int(wanted.max()), -1).values
        parts.append(best.gather(-1, wanted.unsqueeze(-1) - 1).squeeze(-1))
    return torch.cat(parts, 2)


def _without_surplus(ranked: Tensor, lowest: Tensor, budget: Tensor) -> Tensor:
    """Bool, as `ranked`, `(rows, key_blocks)`: of the blocks with the lowest kept score only the first that fit."""
    better, equal = ranked > lowest, ranked == lowest
    return better | (equal & (equal.cumsum(-1) <= (budget - better.sum(-1)).unsqueeze(-1)))


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
