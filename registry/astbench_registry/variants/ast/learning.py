"""How the choice learns: distillation from the layer's own dense attention, regularisers, policy gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.layout import ceil_div
from astbench_registry.block_selection import Call, Selection
from astbench_registry.block_selection.dense_weights import dense_weights, rows_at_a_time
from astbench_registry.configs.adaptive_sparse import ASTConfig


def distillation(scores: Tensor, call: Call, selection: Selection, fraction: float) -> Tensor:
    """KL(target || softmax of the scores over the free blocks), mean over the sampled groups that choose.

    Target: the rows' dense attention times the values' norms (mass on a value of no weight does not
    matter), maximum over the block's keys and the group's sampled rows, without gradient.

    Args:
        scores: `(batch, num_heads, groups, blocks)`.
        call: Zeros where there is padding.
        selection: What there is a choice among.
        fraction: Share of the query rows that are looked at.
    """
    groups, rows = sample_rows(selection, fraction, call.q.device)
    free = selection.free[:, :, groups]
    target, live = _target(call, selection, rows, free)
    predicted = scores[:, :, groups].masked_fill(~free, -torch.inf)
    predicted = predicted.masked_fill(~live.unsqueeze(-1), 0.0).log_softmax(-1)
    predicted = predicted.masked_fill(~(free & live.unsqueeze(-1)), 0.0)
    divergence = torch.special.xlogy(target, target).sum(-1) - (target * predicted).sum(-1)
    return (divergence * live).sum() / live.sum().clamp(min=1)


@torch.no_grad()
def _target(call: Call, selection: Selection, rows: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Target distribution `(batch, heads, sampled groups, blocks)`, and which groups have one to learn from."""
    length, position = call.q.shape[2], rows.flatten()
    index = position.clamp(max=length - 1)
    target = _pooled_attention(call, index, selection)
    target = target.unflatten(2, rows.shape)  # (batch, heads, sampled groups, rows each, blocks)
    real = (position < length).expand(call.q.shape[0], -1)
    queries = call.mask.valid_queries(length)
    if queries is not None:
        real = real & queries[:, index]
    target = target * real.unflatten(1, rows.shape)[:, None, :, :, None]
    target = target.amax(3).masked_fill(~free, 0.0)
    total = target.sum(-1, keepdim=True)
    live = (total.squeeze(-1) > 0) & (free.sum(-1) > 1)
    return target / total.clamp(min=torch.finfo(target.dtype).tiny), live


def density_error(
    scores: Tensor, selection: Selection, config: ASTConfig, wanted: float, share: Tensor | float
) -> Tensor:
    """(predicted density - wanted)^2, the prediction a number of blocks over the visible ones, mean over all rows.

    Adaptive budget: the blocks that reach their share, each as the sigmoid of how far it does, of `temperature`.
    Fixed: the effective number exp(entropy of the predicted mass), which sharpens the scores.

    Args:
        scores: `(batch, num_heads, groups, blocks)`.
        selection: What there is a choice among.
        config: Budget, temperature, floor.
        wanted: Density to reach.
        share: Where the budget is not fixed: the least share of a row's mass that is kept.
    """
    p, free = block_probabilities(scores, selection), selection.free
    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    if config.budget != "fixed":
        least = share.to(log_p.dtype).log() if isinstance(share, Tensor) else math.log(share)
        reach = ((log_p - least) / config.temperature).sigmoid()
        kept = selection.always_kept.sum(-1) + reach.masked_fill(~free, 0.0).sum(-1)
        kept = kept.clamp(min=config.min_blocks)
    else:
        kept = selection.always_kept.sum(-1) + (-(p * log_p).sum(-1)).exp() * free.any(-1)
    visible = selection.visible.sum(-1).expand_as(kept)
    kept, live = torch.minimum(kept, visible), visible > 0
    predicted = (kept / visible.clamp(min=1) * live).sum() / live.sum().clamp(min=1)
    return (predicted - wanted) ** 2


def block_probabilities(scores: Tensor, selection: Selection) -> Tensor:
    """Softmax over the blocks that there is a choice among; zero rows where there is none."""
    part = selection.free.expand_as(scores)
    p = scores.masked_fill(~part, -torch.inf)
    p = p.masked_fill(~part.any(-1, keepdim=True), 0.0).softmax(-1)
    return p.masked_fill(~part, 0.0)


def log_probability(log_p: Tensor, keep: Tensor, free: Tensor) -> Tensor:
    """`(batch,)`: log-probability of keeping just these free blocks, mean over heads and groups.

    As if each block were drawn by itself. (The fixed number of kept ones is left out: it moves tau, which depends on
    all scores, far less than a score moves its own block.)
    """
    live = free & (log_p < 0)
    dropped = (-torch.expm1(log_p.masked_fill(~live, -1.0))).clamp(min=torch.finfo(log_p.dtype).eps).log()
    return torch.where(keep, log_p, dropped).masked_fill(~live, 0.0).sum(-1).mean((1, 2))


def binary_entropy(log_p: Tensor, free: Tensor) -> Tensor:
    """Mean over the free blocks of the entropy of keep-or-not, in nats."""
    live = free & (log_p < 0)
    p = log_p.exp()
    rest = (1 - p).clamp(min=torch.finfo(p.dtype).eps)
    entropy = -(p * log_p + rest * rest.log())
    return entropy.masked_fill(~live, 0.0).sum() / live.sum().clamp(min=1)


def sample_rows(selection: Selection, fraction: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Groups to learn from, and query rows `(sampled groups, rows each)` in them: about `fraction` of all."""
    group, groups = selection.query_group, selection.num_groups
    rows = max(1, round(group * fraction))
    sampled = min(groups, max(1, round(groups * group * fraction / rows)))
    chosen = torch.randperm(groups, device=device)[:sampled].sort().values
    within = torch.rand(sampled, group, device=device).argsort(-1)[:, :rows]
    return chosen, chosen[:, None] * group + within


def _pooled_attention(call: Call, index: Tensor, selection: Selection) -> Tensor:
    """Dense attention of the rows `index` times value norms, block maximum: `(batch, heads, rows, blocks)`.

    A few rows at a time: all of them together would be a share of the N x M matrix.
    """
    q, k, mask = call.q, call.k, call.mask
    norm = call.v.norm(dim=-1, dtype=call.compute_dtype)
    norm = norm.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None, :]
    size, blocks, stop = selection.block_size, selection.num_blocks, k.shape[2]
    pooled = []
    for rows in index.split(rows_at_a_time(q, k)):
        if mask.causal and q.device.type == "cpu":  # a GPU would have to be waited for
            stop = min(k.shape[2], ceil_div(int(rows.max()) + mask.query_offset + 1, size) * size)
        weights = dense_weights(call, rows, stop=stop).mul_(norm[..., :stop])
        if stop % size:
            weights = pad(weights, (0, -stop % size))
        weights = weights.unflatten(-1, (-1, size)).amax(-1)
        pooled.append(pad(weights, (0, blocks - weights.shape[-1])))
    return torch.cat(pooled, 2)
