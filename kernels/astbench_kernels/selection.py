"""From block scores to a layout, and the gradient that goes with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def select_blocks(scores: Tensor, *, always_kept: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:
    """Keep the blocks that are always kept and fill each row up to its budget with the best-scoring candidates.

    Args:
        scores: `(batch, heads, groups, key_blocks)`, finite; compared in float32 (bf16 flips choices).
        always_kept: Bool, broadcastable to `scores`: always kept.
        candidates: Bool, broadcastable: may be kept. A block in neither never is.
        budget: int, broadcastable to `(batch, heads, groups)`: blocks to keep in all, those included.

    Returns:
        Bool of the shape of `scores`. Ties go to the lower block number.

    Cost: O(groups x key_blocks log budget).
    """
    alone = always_kept.numel() == candidates.numel() == scores.shape[-1] > 0 and budget.numel() == 1
    if alone and scores.device.type == "cpu":
        kept = _of_one_row(scores, always_kept, candidates, int(budget))
        if kept is not None:
            return kept
    allowed, budget = always_kept | candidates, budget.expand(scores.shape[:-1])
    # Blocks that are always kept rank above all others, so that the budget counts them too.
    fixed = torch.full((), -torch.inf, device=scores.device).masked_fill(always_kept, torch.inf)
    ranked = torch.where(candidates & ~always_kept, scores.detach().float(), fixed)
    # Per group the blocks that any batch row and head may keep: few for a causal mask's first groups.
    anywhere = allowed[(None,) * (4 - allowed.dim())].flatten(0, 1).any(0).expand(scores.shape[2:])
    lowest, next_best = _lowest_kept(ranked, budget, anywhere)
    kept = ranked >= lowest.unsqueeze(-1)
    tied = (lowest == next_best) & (lowest < torch.inf)
    if bool(tied.any()):
        kept[tied] = _without_surplus(ranked[tied], lowest[tied].unsqueeze(-1), budget[tied])
    return kept


def _of_one_row(scores: Tensor, always_kept: Tensor, candidates: Tensor, budget: int) -> Tensor | None:
    """Of a group alone, as in a step of decoding, whose heads all choose as many of the same; None where scores tie."""
    free = candidates & ~always_kept
    most, wanted = int(free.sum()), budget - int(always_kept.sum())
    if wanted <= 0:
        return always_kept.expand(scores.shape)
    if wanted >= most:
        return (always_kept | free).expand(scores.shape)
    best = torch.where(free, scores.detach().float(), -torch.inf).topk(wanted + 1, -1)
    if bool((best.values[..., wanted - 1] == best.values[..., wanted]).any()):
        return None
    return always_kept.expand(scores.shape).clone().scatter_(-1, best.indices[..., :wanted], True)


ROWS_AT_A_TIME = 512
"""Groups whose thresholds are looked for together. Under a causal mask the first ones see few blocks: short rows."""


SORTED_WHOLE = 512
"""The longest row of scores that is sorted whole on the CPU; of longer ones the best are set apart first."""


def _lowest_kept(ranked: Tensor, budget: Tensor, anywhere: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `(batch, heads, groups)` of each row's last block within the budget, and of the one after it.

    The first is finite where a row has fewer blocks, so that it keeps them all, and inf where only what is always kept
    remains; the second -inf where no block is left.
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


def soft_top_k(
    scores: Tensor, k: Tensor, candidates: Tensor, temperature: float, *, at: Tensor | None = None
) -> Tensor:
    """Log-probabilities of a differentiable top-k: `p = sigmoid((s - tau) / T)` with `sum(p) = k`.

    tau is found by Newton's method without a graph; its gradient is put back by the implicit function theorem
    (`d tau / d s_j = w_j`, `w = p(1-p) / sum p(1-p)`), so that raising one score lowers the others' p.

    Args:
        scores: `(..., key_blocks)`, finite on candidates.
        k: int, broadcastable to `(...)`, how many of the candidates; rows with `k <= 0` or `k >= number of candidates`
            hold no choice and get log-probability 0 and no gradient.
        candidates: Bool, broadcastable to `scores`.
        temperature: T > 0, in the units of the scores.
        at: int64 `(..., width)`, the blocks whose log-probability is wanted; default: all. A block may stand there
            more than once.

    Returns:
        `log p` of the shape of `at` (default: of `scores`), float32 (float64 for float64 scores), zero outside the
        candidates; differentiable once.

    Source: Amos, Koltun and Kolter 2019 (The Limited Multi-Label Projection Layer, arXiv 1906.08707), eq. 3:
        the same projection, which they reach by bisection.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.numel() == 0 or (at is not None and at.numel() == 0):
        return torch.zeros_like(scores if at is None else at, dtype=scores.dtype)
    return _LogProbabilities.apply(scores, k, candidates, temperature, at)


class _LogProbabilities(torch.autograd.Function):
    """`log sigmoid((s - tau) / T)` of the candidates in rows with a choice, else 0; keeps tau for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: Tensor, candidates: Tensor, temperature: float, at: Tensor | None
    ) -> Tensor:
        count = candidates.sum(-1)
        live = ((k > 0) & (k < count)).expand(scores.shape[:-1]).unsqueeze(-1)
        tau = scores.new_zeros(live.shape)
        rows, known, choice, found, kept, of = _as_rows(
            scores, candidates, live, tau, k.unsqueeze(-1), count.unsqueeze(-1)
        )
        chunks = _chunks(known)
        for here, reach in chunks:
            mask = known[here, :reach] & choice[here]
            found[here] = _threshold(rows[here, :reach], mask, kept[here], of[here], temperature)
        ctx.save_for_backward(scores, candidates, live, tau, at)
        ctx.temperature, ctx.chunks = temperature, chunks
        candidates = candidates.expand(scores.shape)
        if at is not None:
            scores, candidates = scores.gather(-1, at), candidates.gather(-1, at)
        log_p = torch.nn.functional.logsigmoid((scores - tau).div_(temperature))
        return log_p.masked_fill_(~(candidates & live), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, candidates, live, tau, at = ctx.saved_tensors
        d_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        rows, known, choice, found, out = _as_rows(scores, candidates, live, tau, d_scores)
        incoming = grad.reshape(-1, grad.shape[-1])
        listed = None if at is None else at.reshape(-1, at.shape[-1])
        for here, reach in ctx.chunks:
            mask = known[here, :reach] & choice[here]
            p = (rows[here, :reach] - found[here]).div_(ctx.temperature).sigmoid_().masked_fill_(~mask, 0.0)
            # What a block's own score does for its p. A slot may stand for a block that is no candidate.
            if listed is None:
                direct = (1 - p).mul_(incoming[here, :reach]).masked_fill_(~mask, 0.0)
                out[here, :reach] = direct
            else:
                slot = listed[here]
                mask = known[here].gather(-1, slot) & choice[here]
                direct = (1 - p.gather(-1, slot.clamp(max=reach - 1))).mul_(incoming[here]).masked_fill_(~mask, 0.0)
                out[here].scatter_add_(-1, slot, direct)
            # What it does for those of all candidates, through tau.
            weight = p.sub_(p.square())
            # First the division: where all p are 0 or 1 the weights are 0, and stay so.
            weight = weight.div_(weight.sum(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny))
            out[here, :reach] -= weight.mul_(direct.sum(-1, keepdim=True))
        return d_scores.div_(ctx.temperature), None, None, None, None


def log_mass(scores: Tensor, blocks: Tensor, log_sizes: Tensor) -> Tensor:
    """Log-sum-exp of `scores + log_sizes` over some blocks, without a table of those sums.

    Args:
        scores: `(batch, heads, groups, key_blocks)`, finite on those blocks.
        blocks: Bool, of the shape of `scores`: which they are.
        log_sizes: `(batch, key_blocks)`, finite, in the dtype of `scores`; gets no gradient.

    Returns:
        `(batch, heads, groups)`, -inf where there are no blocks; differentiable once, in `scores`.
    """
    return _LogMass.apply(scores, blocks, log_sizes)


class _LogMass(torch.autograd.Function):
    """A few rows at a time, which stay in a CPU's cache; keeps its result for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, blocks: Tensor, log_sizes: Tensor) -> Tensor:
        lse = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
        ctx.chunks = []
        for rows, known, found, sizes in zip(scores, blocks, lse, log_sizes, strict=True):
            rows, known, found = _as_rows(rows, known, found)
            ctx.chunks.append(_chunks(known))
            for here, reach in ctx.chunks[-1]:
                mass = (rows[here, :reach] + sizes[:reach]).masked_fill_(~known[here, :reach], -torch.inf)
                found[here] = mass.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(scores, blocks, log_sizes, lse)
        return lse.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, blocks, log_sizes, lse = ctx.saved_tensors
        d_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        pivot = lse.masked_fill(lse == -torch.inf, 0.0)  # of rows without blocks: exp(-inf - 0) is 0, not NaN
        for part in zip(ctx.chunks, scores, blocks, log_sizes, pivot, grad.unsqueeze(-1), d_scores, strict=True):
            chunks, rows, known, sizes, *others = part
            rows, known, whole, incoming, out = _as_rows(rows, known, *others)
            for here, reach in chunks:
                mass = (rows[here, :reach] + sizes[:reach]).sub_(whole[here])
                mass.masked_fill_(~known[here, :reach], -torch.inf)
                out[here, :reach] = mass.exp_().mul_(incoming[here])
        return d_scores, None, None


SCORES_AT_A_TIME = 2**17
"""Scores whose soft threshold is looked for together on the CPU: 512 KiB of them stay in its cache."""

MOST_STEPS = 16
"""Steps towards a soft threshold: three to seven are enough for most rows, and twice as many for nearly all others. The
CPU may take twice this number, a GPU takes it without asking."""


def _as_rows(scores: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Each `(rows, its last dimension)`, with as many rows as `scores` has."""
    shape = scores.shape[:-1]
    return tuple(x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1]) for x in (scores, *others))


def _chunks(candidates: Tensor) -> list[tuple[slice, int]]:
    """Of `(rows, key_blocks)` rows to look at together, and how many columns hold all their candidates."""
    rows, width = candidates.shape
    if candidates.device.type != "cpu":  # neither cut nor asked, for which a GPU would wait
        return [(slice(0, rows), width)]
    step = max(1, SCORES_AT_A_TIME // max(1, width))
    chunks = []
    for start in range(0, rows, step):
        here = slice(start, start + step)
        columns = candidates[here].view(torch.uint8).amax(0).nonzero()  # any() takes twenty times as long
        if len(columns):
            chunks.append((here, int(columns[-1]) + 1))
    return chunks


def _threshold(scores: Tensor, mask: Tensor, k: Tensor, count: Tensor, temperature: float) -> Tensor:
    """`(rows, 1)`: tau of rows `(rows, key_blocks)`, k of `count` candidates; anything finite where that is no choice.

    Newton's method for `logit(mean of p) = logit(k / n)`, which is a straight line where the scores are all equal or
    spread like a logistic distribution, from the tau that one of their mean and variance has. A step that leaves the
    bracket becomes one of bisection.
    """
    live = (k > 0) & (k < count)
    count, k = torch.where(live, count, 2).to(scores.dtype), torch.where(live, k, 1).to(scores.dtype)
    wanted = (k / (count - k)).log()
    values = (scores / temperature).masked_fill_(~mask, 0.0)  # in units of the temperature
    mean = values.sum(-1, keepdim=True) / count
    variance = (_square_sum(values) / count - mean.square()).clamp_(min=0.0)
    low = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True).masked_fill_(~live, 0.0) - wanted
    # sigmoid(-inf) = 0 stays out of every sum.
    values.masked_fill_(~mask, -torch.inf)
    high = values.amax(-1, keepdim=True).masked_fill_(~live, 0.0) - wanted
    # A logistic distribution of scale b has variance (pi b)^2 / 3; the noise of p has scale 1.
    tau = (mean - wanted * (1 + 3 / math.pi**2 * variance).sqrt()).clamp(low, high)
    tau = torch.where(tau.isfinite(), tau, low / 2 + high / 2)  # the variance of scores of 1e20 overflows
    precise = scores.dtype == torch.float64
    enough, rounding = 1e-12 if precise else 1e-5, torch.finfo(scores.dtype).eps
    for _ in range(2 * MOST_STEPS if precise or scores.device.type == "cpu" else MOST_STEPS):
        p = (values - tau).sigmoid_()
        total = p.sum(-1, keepdim=True)
        slope = total - _square_sum(p)
        low, high = torch.where(total > k, tau, low), torch.where(total > k, high, tau)
        step = (total / (count - total)).log_().sub_(wanted) * total * (count - total) / (count * slope)
        near = (total - k).abs() <= enough * torch.minimum(k, count - k) + rounding * count
        moved = tau + step
        inside = (moved >= low) & (moved <= high)
        tau = torch.where(inside, moved, torch.where(near, tau, low / 2 + high / 2))
        if scores.device.type == "cpu" and bool((near | ~live).all()):
            break
    return tau * temperature


def _square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
