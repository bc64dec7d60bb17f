"""From block scores to a layout, and the gradient that goes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def select_blocks(scores: Tensor, *, forced: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:
    """Keep the forced blocks and fill each row up to its budget with the best-scoring candidates.

    Args:
        scores: `(batch, heads, groups, key_blocks)`, finite; compared in float32 (bf16 flips choices).
        forced: Bool, broadcastable to `scores`: always kept.
        candidates: Bool, broadcastable: may be kept. A block in neither never is.
        budget: int, broadcastable to `(batch, heads, groups)`: blocks to keep in all, forced ones included.

    Returns:
        Bool of the shape of `scores`. Ties go to the lower block number.

    Cost: O(groups x key_blocks log budget).
    """
    allowed, budget = forced | candidates, budget.expand(scores.shape[:-1])
    # Forced blocks rank above all others, so that the budget counts them too.
    ranked = scores.detach().float().masked_fill(~allowed, -torch.inf).masked_fill_(forced, torch.inf)
    # Per group the blocks that any batch row and head may keep: few for a causal mask's first groups.
    anywhere = allowed[(None,) * (4 - allowed.dim())].flatten(0, 1).any(0).expand(scores.shape[2:])
    lowest, next_best = _lowest_kept(ranked, budget, anywhere)
    kept = ranked >= lowest.unsqueeze(-1)
    tied = (lowest == next_best) & (lowest < torch.inf)
    if bool(tied.any()):
        kept[tied] = _without_surplus(ranked[tied], lowest[tied].unsqueeze(-1), budget[tied])
    return kept


SCORES_AT_A_TIME = 2**17
"""Scores whose soft threshold is looked for together: 512 KiB of them."""

ROWS_AT_A_TIME = 512
"""Groups whose thresholds are looked for together. Under a causal mask the first ones see few blocks: short rows."""


SORTED_WHOLE = 512
"""The longest row of scores that is sorted whole on the CPU; of longer ones the best are set apart first."""


def _lowest_kept(ranked: Tensor, budget: Tensor, anywhere: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `(batch, heads, groups)` of each row's last block within the budget, and of the one after it.

    The first is finite where a row has fewer blocks, so that it keeps them all, and inf where only what is forced is
    kept; the second -inf where no block is left.
    """
    if ranked.numel() == 0:
        empty = ranked.new_full(ranked.shape[:-1], torch.inf)
        return empty, empty
    lowest, next_best = [], []
    step = ROWS_AT_A_TIME if ranked.device.type == "cpu" else ranked.shape[2]  # a GPU would wait at every one
    for start in range(0, ranked.shape[2], step):
        here = slice(start, start + step)
        blocks = anywhere[here].any(0).nonzero()
        reach = int(blocks[-1]) + 1 if len(blocks) else 1
        wanted = budget[:, :, here].clamp(1, reach).unsqueeze(-1)
        best = _best_first(ranked[:, :, here, :reach], wanted)
        lowest.append(best.gather(-1, wanted - 1))
        beyond = best.gather(-1, wanted.clamp(max=best.shape[-1] - 1))
        next_best.append(beyond.masked_fill_(wanted == best.shape[-1], -torch.inf))
    last = torch.cat(lowest, 2).squeeze(-1).clamp_(min=torch.finfo(ranked.dtype).min)
    return last.masked_fill_(budget <= 0, torch.inf), torch.cat(next_best, 2).squeeze(-1)


def _best_first(ranked: Tensor, wanted: Tensor) -> Tensor:
    """Each row's scores from the best on, at least one more of them than are wanted, where there are so many."""
    most = min(ranked.shape[-1], int(wanted.max()) + 1)
    if ranked.device.type != "cpu":
        return ranked.topk(most, -1).values
    # numpy has vector instructions for this: of an eighth three to ten times as fast as torch's top-k on one thread.
    negative = ranked.neg().numpy()
    if ranked.shape[-1] > SORTED_WHOLE:
        negative = np.partition(negative, most - 1, axis=-1)[..., :most]
    return torch.from_numpy(np.sort(negative, axis=-1)).neg_()


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
        `log p`, float32 (float64 for float64 scores), zero outside the candidates; differentiable once.

    Source: Amos, Koltun and Kolter 2019 (The Limited Multi-Label Projection Layer, arXiv 1906.08707), eq. 3:
        the same projection, reached by bisection.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    live = (k > 0) & (k < candidates.sum(-1))
    mask = candidates & live.unsqueeze(-1)
    with torch.no_grad():
        # Seventeen passes over the scores: a few rows at a time stay in a CPU's cache.
        rows = SCORES_AT_A_TIME // max(1, scores.shape[-1]) if scores.device.type == "cpu" else live.numel()
        values, masks = (x.reshape(-1, x.shape[-1]).split(max(1, rows)) for x in (scores, mask))
        kept = k.expand(live.shape).reshape(-1, 1).split(max(1, rows))
        tau = torch.cat([_threshold(*part, temperature) for part in zip(values, masks, kept, strict=True)])
        tau = tau.view(*live.shape, 1)
    return _LogProbabilities.apply(scores, tau, mask, temperature)


def _threshold(scores: Tensor, mask: Tensor, k: Tensor, temperature: float) -> Tensor:
    """`(rows, 1)`: tau of rows `(rows, key_blocks)`, anything finite where there is no choice."""
    # In units of the temperature, and -inf where there is no choice: sigmoid(-inf) = 0 stays out of every sum.
    values = (scores / temperature).masked_fill_(~mask, -torch.inf)
    live = mask.any(-1, keepdim=True)
    high = values.amax(-1, keepdim=True) + 30
    low = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True) - 30
    low, high = low.masked_fill_(~live, -1.0), high.masked_fill_(~live, 1.0)
    # Bisection until Newton is safe; Newton's error squares with every pass.
    for _ in range(12):
        middle = (low + high) / 2
        too_many = (values - middle).sigmoid_().sum(-1, keepdim=True) > k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    tau = (low + high) / 2
    for _ in range(4 if scores.dtype == torch.float32 else 7):
        p = (values - tau).sigmoid_()
        total = p.sum(-1, keepdim=True)
        slope = (total - p.square_().sum(-1, keepdim=True)).clamp_(min=torch.finfo(p.dtype).tiny)
        # Never out of the bracket, wherever a flat slope points.
        tau = (tau + (total - k) / slope).clamp(low, high)
    return tau * temperature


class _LogProbabilities(torch.autograd.Function):
    """`log sigmoid((s - tau) / T)` where `mask` is, else 0; keeps no tensor of its own for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: Tensor, mask: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores, tau, mask)
        ctx.temperature = temperature
        log_p = torch.nn.functional.logsigmoid((scores - tau).div_(temperature))
        return log_p.masked_fill_(~mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, tau, mask = ctx.saved_tensors
        p = (scores - tau).div_(ctx.temperature).sigmoid_().masked_fill_(~mask, 0.0)
        direct = (1 - p).mul_(grad).div_(ctx.temperature).masked_fill_(~mask, 0.0)
        weight = p.sub_(p.square())
        weight = weight.div_(weight.sum(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny))
        return direct.sub_(weight.mul_(direct.sum(-1, keepdim=True))), None, None, None
