"""Adaptive Sparse Transformer attention: a small learned predictor picks each query group's key blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from astbench_kernels import BlockLayout, log_mass, select_blocks, soft_top_k
from astbench_kernels.layout import ceil_div
from astbench_kernels.triton import pool_blocks
from astbench_registry.block_selection import (
    BIDIRECTIONAL_GROUP,
    BlockSelectingAttention,
    Grid,
    Selection,
    Taught,
    block_scores,
)
from astbench_registry.block_selection.coarse_keys import CoarseAttention, CoarseKeys
from astbench_registry.block_selection.dense_weights import dense_weights, rows_at_a_time
from astbench_registry.block_selection.pooling import (
    extremes_of_blocks,
    mean_of_blocks,
    real_in_blocks,
    valid_in_blocks,
)
from astbench_registry.configs.adaptive_sparse import ASTConfig
from astbench_registry.interface import AttentionContext, AttentionShape
from astbench_registry.mask import AttentionMask

GOLDEN_RATIO = (1 + 5**0.5) / 2


class AdaptiveSparseAttention(BlockSelectingAttention):
    """Score = pooled score + learned low-rank term; top-k blocks; trained by task loss and distillation.

    For query group i and key block j of one head:

        s_ij = exp(g) * scale * q_i . mean(k_j) + u_i . w_j / sqrt(rank)
        u_i = W_u [unit([q_i ; c_i]) ; 1],   w_j = W_w unit([mean(k_j) ; max(k_j) ; min(k_j) ; mean(v_j)])

    with unit(x) = x / |x|; the 1 finds what every group looks for (a question, say). q_i is the query that speaks for
    the group; c_i, the global context, is the mean of the values over what may be known: everything visible, or under
    a causal mask the completed blocks before the group. Local token features are read from keys and values, not from
    hidden states: they are linear maps of them, they lie in the KV cache already, and so decoding needs no state of
    its own.

    With `sub_blocks` m there are m means a block, and s_ij is the logarithm of their m exponentials' sum: at one token
    each it would be the block's true mass.

    With `patterns`, each head adds its own weighted sum of cosines of the distance i - j. W_w, g and those weights
    start at zero, so the untrained predictor is `pooled_topk` exactly, and a pretrained dense model runs before any
    training. With estimator "straight_through" each kept block carries `log p - stop(log p)`
    as a logit bias, p from :func:`astbench_kernels.soft_top_k`: zero in value, it lets the task loss raise
    the scores of blocks that help; with `sample`, p is also how often a block is kept while training, so that
    those are found that the scores would leave out. With "policy_gradient" the choice is an action instead, drawn
    that way, and its log-probability is left to whoever knows how the sequence fared. While training, a distillation
    loss moves the scores towards the layer's own dense attention, pooled over blocks, on a sample of query rows.

    With `rest`, the blocks that a row may choose and did not join its softmax as one token: its logit the logarithm of
    the mass that their scores predict, `sum_j n_j exp(s_ij)` over their n_j tokens, its value c_i. Scores that nothing
    taught yet are those of the mean keys, which is less than the true mass (Jensen); what the task loss teaches the
    predictor through it comes without any estimator. After Ribar et al. 2023 (SparQ attention, arXiv 2312.04985,
    algorithm 1), who share out the weight between the best keys and the mean value by approximate scores of all keys.

    With `coarse_stride`, layers from `coarse_from` on also see every window of s tokens as one coarse token, in the
    same softmax (:class:`CoarseKeys`); s doubles every `coarse_every` layers.
    """

    config: ASTConfig

    def __init__(self, config: ASTConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        dim, rank = shape.head_dim, config.rank
        self.gain = nn.Parameter(torch.zeros(shape.num_heads))
        self.query_weight = nn.Parameter(torch.empty(shape.num_heads, 2 * dim + 1, rank))
        self.key_weight = nn.Parameter(torch.zeros(shape.num_kv_heads, 4 * dim, rank))
        nn.init.normal_(self.query_weight)
        self.pattern_weight = nn.Parameter(torch.zeros(shape.num_heads, config.patterns)) if config.patterns else None
        stride = config.coarse_stride_at(shape.layer_index)
        self.coarse_keys = CoarseKeys(stride, shape.num_kv_heads) if stride else None

    def summarise(self, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, *, fused: bool) -> tuple[Tensor, ...]:
        """See the base class: the rows that are scored, and for the global context mean values and sizes."""
        if self._detaches():
            k, v = k.detach(), v.detach()
        return self._summarise(k, v, mask, grid, fused=fused)

    def factors(
        self, q: Tensor, blocks: tuple[Tensor, ...], mask: AttentionMask, grid: Grid, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See the base class. Time O(N + M / block_size) for the features."""
        return self._factors(q.detach() if self._detaches() else q, blocks, mask, grid, scale)

    def _detaches(self) -> bool:
        """Whether what teaches the predictor stops at its inputs."""
        return self.config.detach and self.config.estimator != "soft"

    def _summarise(self, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, *, fused: bool) -> tuple[Tensor, ...]:
        compute = torch.promote_types(k.dtype, torch.float32)
        if fused:
            mean_key, max_key, min_key, mean_value, counts = pool_blocks(k, v, mask.key_valid, grid.block_size)
        else:
            mean_key, mean_value = mean_of_blocks(k, mask, grid), mean_of_blocks(v, mask, grid)
            max_key, min_key = extremes_of_blocks(k, mask, grid)
            counts = real_in_blocks(k, mask, grid).sum(-1)
        # Of length 1, so that one learning rate serves every layer of every backbone: with features of size 1, a
        # step of Adam moved scores by several units, and the choice flickered.
        local = _unit(torch.cat([mean_key, max_key, min_key, mean_value], -1))
        key_side = [mean_key, torch.matmul(local, self.key_weight.to(compute))]
        parts = self.config.sub_blocks
        if parts > 1:
            fine = replace(grid, block_size=grid.block_size // parts, num_blocks=grid.num_blocks * parts)
            size = real_in_blocks(k, mask, fine).sum(-1)
            # Of no tokens, no weight: exp(-1e4) is 0, where -inf would make NaN of blocks that are all padding.
            weight = size.clamp(min=1).to(compute).log().masked_fill(size == 0, -1e4)
            key_side = [mean_of_blocks(k, mask, fine), key_side[1].repeat_interleave(parts, 2)]
            key_side.append(weight[:, None, :, None].expand(*k.shape[:2], -1, -1))
        return torch.cat(key_side, -1), mean_value, counts.to(compute)[:, None, :, None]

    def _factors(
        self, q: Tensor, blocks: tuple[Tensor, ...], mask: AttentionMask, grid: Grid, scale: float
    ) -> tuple[Tensor, Tensor]:
        compute = torch.promote_types(q.dtype, torch.float32)
        key_side, mean_value, counts = blocks
        context = _global_context(mean_value, counts, mask, grid)
        context = context.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 1)
        speaker = self.speaker(q, mask, grid)
        features = pad(_unit(torch.cat([speaker, context], -1)), (0, 1), value=1.0)
        u = torch.matmul(features, self.query_weight.to(compute)) * self.config.rank**-0.5
        gain = scale * self.gain.to(compute).exp()[:, None, None]
        query_side = [speaker * gain, u]
        if self.config.sub_blocks > 1:
            query_side.append(torch.ones_like(u[..., :1]))
        if self.pattern_weight is not None:
            rows, columns = _distance_patterns(self.pattern_weight.to(compute), grid)
            query_side.append(rows.expand(q.shape[0], -1, -1, -1))
            columns = columns.repeat_interleave(self.config.sub_blocks, 0)
            key_side = torch.cat([key_side, columns.expand(*key_side.shape[:2], -1, -1)], -1)
        return torch.cat(query_side, -1), key_side

    def needs_scores(self) -> bool:
        """Also for the bias of "soft", for sampling, for the adaptive budget, and for what stands for the rest."""
        config = self.config
        forward = config.estimator == "soft" or config.budget == "adaptive" or config.rest
        return super().needs_scores() or self._draws() or forward

    @torch.no_grad()
    def fused_layout(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, context: AttentionContext
    ) -> BlockLayout | None:
        """See the base class; None where global tokens add blocks, or blocks have several means."""
        if self._global_tokens(mask, context) is not None or self.config.sub_blocks > 1:
            return None
        return super().fused_layout(q, k, v, mask, scale, context)

    def with_fixed_blocks(self, selection: Selection, mask: AttentionMask, context: AttentionContext) -> Selection:
        """Blocks that hold a global token are kept by all; groups that do keep all, and the others as many as ever."""
        tokens = self._global_tokens(mask, context)
        if tokens is None:
            return selection
        known = valid_in_blocks(tokens, selection.num_blocks, selection.block_size).any(-1)[:, None, None, :]
        asking = valid_in_blocks(tokens, selection.num_groups, selection.query_group).any(-1)[:, None, :, None]
        forced = selection.forced | ((known | asking) & selection.visible)
        return replace(selection, forced=forced)

    def _global_tokens(self, mask: AttentionMask, context: AttentionContext) -> Tensor | None:
        if not self.config.global_tokens or mask.pattern != "bidirectional_self":
            return None
        return context.global_tokens

    def coarse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, backend: str
    ) -> CoarseAttention | None:
        """Every window of this layer's stride as one token; None where there are none, or no whole window."""
        if self.coarse_keys is None or k.shape[2] < self.coarse_keys.stride:
            return None
        return self.coarse_keys(q, k, v, mask, scale, backend)

    def rest(
        self,
        scores: Tensor,
        keep: Tensor,
        blocks: tuple[Tensor, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        selection: Selection,
        scale: float,
    ) -> tuple[Tensor, Tensor] | None:
        """See the base class: one token, the same for all rows of a group."""
        if not self.config.rest:
            return None
        if torch.is_grad_enabled() and self._detaches():  # part of the forward pass, its gradient stops nowhere
            blocks = self._summarise(k, v, mask, selection, fused=False)
            scores = block_scores(*self._factors(q, blocks, mask, selection, scale), selection.num_blocks)
        _, mean_value, counts = blocks
        sizes = counts.flatten(1).expand(q.shape[0], -1).clamp(min=1).log()
        if self.config.sub_blocks > 1:  # the scores of several means hold their sizes
            sizes = torch.zeros_like(sizes)
        lse = log_mass(scores, selection.free & ~keep, sizes.to(scores.dtype))
        value = _global_context(mean_value, counts, mask, selection)
        value = value.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 1)
        group = torch.arange(q.shape[2], device=q.device) // selection.query_group
        return value[:, :, group], lse[:, :, group]

    def density_at(self, step: int) -> float:
        """The scheduled density while training, the final one otherwise."""
        config = self.config
        if config.density_start is None or not self.training or step >= config.density_steps:
            return config.density
        done = max(0, step - config.density_hold) / (config.density_steps - config.density_hold)
        if config.density_schedule == "mixed":
            # Multiples of the golden ratio fill [0, 1) evenly: every few steps hold their share of sparse ones.
            return config.density if step * GOLDEN_RATIO % 1 < done else config.density_start
        return config.density_start + (config.density - config.density_start) * done

    def choose(self, scores: Tensor, selection: Selection, context: AttentionContext) -> Tensor:
        """Fixed budget as the base class; adaptive: the blocks whose share of the predicted mass reaches `share`."""
        if self._draws():
            # P(score + logistic noise > tau) is the p of soft_top_k, for noise of the same temperature.
            uniform = torch.rand(scores.shape, device=scores.device, dtype=scores.dtype)
            scores = scores + self.config.temperature * uniform.logit(torch.finfo(scores.dtype).eps)
        if self.config.budget == "fixed":
            return super().choose(scores, selection, context)
        wanted = (_block_probabilities(scores, selection) >= self.config.share) | selection.forced
        budget = torch.minimum(wanted.sum(-1).clamp(min=self.config.min_blocks), selection.visible.sum(-1))
        return select_blocks(scores, forced=selection.forced, candidates=selection.candidates, budget=budget)

    def teach(
        self,
        scores: Tensor,
        keep: Tensor,
        layout: BlockLayout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        selection: Selection,
        scale: float,
        context: AttentionContext,
    ) -> Taught:
        """See the base class; the losses are those of distillation and regularisation."""
        config = self.config
        bias, log_prob, losses = None, None, {}
        free = selection.free.expand_as(keep)
        learning = self.training and torch.is_grad_enabled()
        wants_bias = config.estimator == "soft" or (config.estimator == "straight_through" and learning)
        policy = learning and config.estimator == "policy_gradient"
        whole = policy or (learning and config.lambda_entropy > 0)
        if wants_bias or whole:
            listed = layout.indices.long()
            log_p = self._gate(scores, layout, selection, at=None if whole else listed)
            if wants_bias:
                bias = (log_p.gather(-1, listed) if whole else log_p).masked_fill(~layout.slots, 0.0)
                if config.estimator == "straight_through":
                    bias = bias - bias.detach()
            if policy:
                log_prob = _log_probability(log_p, keep, free)
            if learning and config.lambda_entropy:
                losses["entropy"] = config.lambda_entropy * _binary_entropy(log_p, free)
        if learning and config.lambda_density:
            losses["density"] = config.lambda_density * self._density_error(scores, keep, selection, context)
        weight = self._distill_weight(context.step)
        if learning and weight:
            losses["distill"] = weight * self._distill(scores, q, k, v, mask, selection, scale)
        return Taught(bias, losses, log_prob)

    def _draws(self) -> bool:
        """Whether this call keeps blocks by scores plus noise."""
        return self.training and (self.config.sample or self.config.estimator == "policy_gradient")

    def _gate(self, scores: Tensor, layout: BlockLayout, selection: Selection, at: Tensor | None = None) -> Tensor:
        """Log-probabilities of the differentiable top-k, of all blocks or those `at`.

        It counts with the free blocks that were kept, but with no more than the schedule ends with. So steps at a
        higher density already teach the last one's choice, dense steps best of all: there the task's gradient says of
        every block whether more of it would help. A gate that is felt in the forward pass ("soft"), and the
        probability of a choice, have to agree with what is kept.
        """
        forced = selection.forced.sum(-1)
        kept = layout.counts - forced
        if self.config.budget == "fixed" and self.config.estimator not in ("soft", "policy_gradient"):
            final = self.budget(selection.visible.sum(-1), AttentionContext(step=self.config.density_steps))
            kept = torch.minimum(kept, (final - forced).clamp(min=1))
        return soft_top_k(scores, kept, selection.free, self.config.temperature, at=at)

    def _distill_weight(self, step: int) -> float:
        config = self.config
        if not config.distill_decay_steps:
            return config.distill_weight
        return config.distill_weight * max(0.0, 1.0 - step / config.distill_decay_steps)

    def _density_error(self, scores: Tensor, keep: Tensor, selection: Selection, context: AttentionContext) -> Tensor:
        """(predicted density - target)^2, the prediction a number of blocks over the visible ones, mean over all rows.

        Adaptive budget: the blocks that reach their share, each as the sigmoid of how far it does, of `temperature`.
        Fixed: the effective number exp(entropy of the predicted mass), which sharpens the scores.
        """
        p, free = _block_probabilities(scores, selection), selection.free
        log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        if self.config.budget == "adaptive":
            reach = ((log_p - math.log(self.config.share)) / self.config.temperature).sigmoid()
            kept = selection.forced.sum(-1) + reach.masked_fill(~free, 0.0).sum(-1)
            kept = kept.clamp(min=self.config.min_blocks)
        else:
            kept = selection.forced.sum(-1) + (-(p * log_p).sum(-1)).exp() * free.any(-1)
        visible = selection.visible.sum(-1).expand_as(kept)
        kept, live = torch.minimum(kept, visible), visible > 0
        predicted = (kept / visible.clamp(min=1) * live).sum() / live.sum().clamp(min=1)
        return (predicted - self.density_at(context.step)) ** 2

    def _distill(
        self,
        scores: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        selection: Selection,
        scale: float,
    ) -> Tensor:
        """KL(target || softmax of the scores over the free blocks), mean over the sampled groups that choose.

        Target: the rows' dense attention times the values' norms (mass on a value of no weight does not
        matter), maximum over the block's keys and the group's sampled rows, without gradient.
        """
        groups, rows = _sample_rows(selection, self.config.distill_fraction, q.device)
        free = selection.free[:, :, groups]
        with torch.no_grad():
            position = rows.flatten()
            index = position.clamp(max=q.shape[2] - 1)
            target = _pooled_attention(q, index, k, v, mask, selection, scale)
            target = target.unflatten(2, rows.shape)  # (batch, heads, sampled groups, rows each, blocks)
            real = (position < q.shape[2]).expand(q.shape[0], -1)
            queries = mask.valid_queries(q.shape[2])
            if queries is not None:
                real = real & queries[:, index]
            target = target * real.unflatten(1, rows.shape)[:, None, :, :, None]
            target = target.amax(3).masked_fill(~free, 0.0)
            total = target.sum(-1, keepdim=True)
            live = (total.squeeze(-1) > 0) & (free.sum(-1) > 1)
            target = target / total.clamp(min=torch.finfo(target.dtype).tiny)
        predicted = scores[:, :, groups].masked_fill(~free, -torch.inf)
        predicted = predicted.masked_fill(~live.unsqueeze(-1), 0.0).log_softmax(-1)
        predicted = predicted.masked_fill(~(free & live.unsqueeze(-1)), 0.0)
        divergence = torch.special.xlogy(target, target).sum(-1) - (target * predicted).sum(-1)
        return (divergence * live).sum() / live.sum().clamp(min=1)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Kept blocks (fixed budget), coarse tokens, scores, features; without the training-only distillation.

        By the method: where the CPU kernel computes all pairs and picks the listed ones, it does more.
        """
        shape, rank = self.shape, self.config.rank
        group = self.config.query_group or (1 if mask.sequential else BIDIRECTIONAL_GROUP)
        groups, blocks = -(-query_length // group), -(-key_length // self.config.block_size)
        width = shape.head_dim + rank + 2 * self.config.patterns
        if self.config.sub_blocks > 1:
            blocks, width = blocks * self.config.sub_blocks, width + 1
        per_head = 2 * groups * blocks * width + 2 * groups * (2 * shape.head_dim + 1) * rank
        features = 2 * -(-key_length // self.config.block_size) * 4 * shape.head_dim * rank
        predictor = batch * (shape.num_heads * per_head + shape.num_kv_heads * features)
        coarse = 0
        if self.coarse_keys is not None:
            coarse = self.coarse_keys.flops(batch, shape.num_heads, query_length, key_length, shape.head_dim, mask)
        return super().flops(batch, query_length, key_length, mask) + predictor + coarse


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero, with finite gradients."""
    return rms_norm(x, x.shape[-1:]) * x.shape[-1] ** -0.5


def _distance_patterns(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Both sides of `sum_p weight_p cos(2 pi (i - j) / period_p)`, i and j in blocks.

    `(num_heads, groups, 2 patterns)` and `(blocks, 2 patterns)`: as cos(a - b) = cos a cos b + sin a sin b, patterns
    cost a few more columns of the score's product, and the kernel that chooses needs not know of them.
    """
    periods = 4.0 * 2.0 ** torch.arange(weight.shape[-1], device=weight.device, dtype=torch.float64)

    def waves(position: Tensor) -> tuple[Tensor, Tensor]:
        angle = 2 * torch.pi * position.double()[:, None] / periods
        return angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)

    cos, sin = waves(grid.first / grid.block_size)
    weight = weight[:, None]
    columns = torch.cat(waves(torch.arange(grid.num_blocks, device=weight.device)), -1)
    return torch.cat([weight * cos, weight * sin], -1), columns


def _global_context(mean_value: Tensor, counts: Tensor, mask: AttentionMask, grid: Grid) -> Tensor:
    """`(batch, kv_heads, groups, d)`: mean of the values that each group may know of.

    Args:
        mean_value: `(batch, kv_heads, blocks, d)`.
        counts: `(batch or 1, 1, blocks, 1)`: values that each is the mean of.
        mask: What may be seen.
        grid: Groups and blocks.
    """
    if not mask.causal or grid.num_groups == 1:  # while decoding one sum costs far less than running sums
        known = min(mask.query_offset // grid.block_size, grid.num_blocks) if mask.causal else grid.num_blocks
        counts, mean_value = counts[:, :, :known], mean_value[:, :, :known]
        mean = torch.matmul(counts.transpose(2, 3), mean_value) / counts.sum(2, keepdim=True).clamp(min=1)
        return mean.expand(-1, -1, grid.num_groups, -1)
    total = (mean_value * counts).cumsum(2)
    mean = pad(total / counts.cumsum(2).clamp(min=1), (0, 0, 1, 0))  # entry n: over the first n blocks
    return mean[:, :, (grid.first // grid.block_size).clamp(max=grid.num_blocks)]


def _block_probabilities(scores: Tensor, selection: Selection) -> Tensor:
    """Softmax over the blocks that there is a choice among; zero rows where there is none."""
    part = selection.free.expand_as(scores)
    p = scores.masked_fill(~part, -torch.inf)
    p = p.masked_fill(~part.any(-1, keepdim=True), 0.0).softmax(-1)
    return p.masked_fill(~part, 0.0)


def _log_probability(log_p: Tensor, keep: Tensor, free: Tensor) -> Tensor:
    """`(batch,)`: log-probability of keeping just these free blocks, mean over heads and groups.

    As if each block were drawn by itself. (The fixed number of kept ones is left out: it moves tau, which depends on
    all scores, far less than a score moves its own block.)
    """
    live = free & (log_p < 0)
    dropped = (-torch.expm1(log_p.masked_fill(~live, -1.0))).clamp(min=torch.finfo(log_p.dtype).eps).log()
    return torch.where(keep, log_p, dropped).masked_fill(~live, 0.0).sum(-1).mean((1, 2))


def _binary_entropy(log_p: Tensor, free: Tensor) -> Tensor:
    """Mean over the free blocks of the entropy of keep-or-not, in nats."""
    live = free & (log_p < 0)
    p = log_p.exp()
    rest = (1 - p).clamp(min=torch.finfo(p.dtype).eps)
    entropy = -(p * log_p + rest * rest.log())
    return entropy.masked_fill(~live, 0.0).sum() / live.sum().clamp(min=1)


def _sample_rows(selection: Selection, fraction: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Groups to teach, and query rows `(sampled groups, rows each)` in them: about `fraction` of all."""
    group, groups = selection.query_group, selection.num_groups
    rows = max(1, round(group * fraction))
    sampled = min(groups, max(1, round(groups * group * fraction / rows)))
    chosen = torch.randperm(groups, device=device)[:sampled].sort().values
    within = torch.rand(sampled, group, device=device).argsort(-1)[:, :rows]
    return chosen, chosen[:, None] * group + within


def _pooled_attention(
    q: Tensor, index: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, selection: Selection, scale: float
) -> Tensor:
    """Dense attention of the rows `index` times value norms, block maximum: `(batch, heads, rows, blocks)`.

    A few rows at a time: all of them together would be a share of the N x M matrix.
    """
    norm = v.norm(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    norm = norm.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None, :]
    size, blocks, stop = selection.block_size, selection.num_blocks, k.shape[2]
    pooled = []
    for rows in index.split(rows_at_a_time(q, k)):
        if mask.causal and q.device.type == "cpu":  # a GPU would have to be waited for
            stop = min(k.shape[2], ceil_div(int(rows.max()) + mask.query_offset + 1, size) * size)
        weights = dense_weights(q, k, mask, scale, rows, stop=stop).mul_(norm[..., :stop])
        if stop % size:
            weights = pad(weights, (0, -stop % size))
        weights = weights.unflatten(-1, (-1, size)).amax(-1)
        pooled.append(pad(weights, (0, blocks - weights.shape[-1])))
    return torch.cat(pooled, 2)
