"""Adaptive Sparse Transformer attention: a small learned predictor picks each query group's key blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels import BlockLayout, log_mass, soft_top_k
from astbench_registry.block_selection import BlockFeatures, Call, Selection, SelectorLosses, block_scores
from astbench_registry.block_selection.coarse_keys import CoarseAttention, CoarseKeys
from astbench_registry.block_selection.pooling import valid_in_blocks
from astbench_registry.budget import ShareCounts
from astbench_registry.configs.adaptive_sparse import ASTConfig
from astbench_registry.interface import AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.variants.ast.learning import (
    binary_entropy,
    density_error,
    distillation,
    log_probability,
)
from astbench_registry.variants.ast.predictor import LearnedBlockScores

GOLDEN_RATIO = (1 + 5**0.5) / 2


class AdaptiveSparseAttention(LearnedBlockScores):
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

    With `index_dim` r there is an index of tokens in place of means and learned term (:class:`TokenIndex`):

        s_ij = log sum over the tokens t of block j of exp(exp(g) * scale * (q_i A) . (k_t B)),   A, B of rank r

    with `index_pool` p over the block's runs of p tokens, each by its largest score.

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

    def __init__(self, config: ASTConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        stride = config.coarse_stride_at(shape.layer_index)
        self.coarse_keys = CoarseKeys(stride, shape.num_kv_heads) if stride else None
        self.pool = config.index_pool
        self._counts: ShareCounts | None = None
        self.calibrated_share: Tensor
        if self.budget_is_calibrated:  # a buffer: it is kept with the weights
            self.register_buffer("calibrated_share", torch.tensor(config.share))

    @property
    def share(self) -> Tensor | float:
        """The least share of a row's free mass that is kept where the budget is not fixed."""
        return self.calibrated_share if self.budget_is_calibrated else self.config.share

    @property
    def budget_is_calibrated(self) -> bool:
        """See the base class."""
        return self.config.budget == "calibrated"

    def count_shares(self, counts: ShareCounts | None) -> None:
        """See the base class."""
        self._counts = counts

    def set_share(self, share: float) -> None:
        """See the base class."""
        self.calibrated_share.fill_(share)

    def fusible(self, call: Call) -> bool:
        """See the base class."""
        config = self.config
        forward = config.estimator == "soft" or config.rest or self._counts is not None
        if self.selector.tile(call.mask) is None:  # the kernels for lists that rows have of their own do less
            forward = forward or config.budget != "fixed" or config.sub_blocks > 1 or config.index_dim > 0
        more_kept = self._global_tokens(call) is not None
        return super().fusible(call) and not (forward or self._draws() or more_kept)

    def needs_no_scores(self, call: Call) -> bool:
        """See the base class."""
        config = self.config
        wanted = config.estimator == "soft" or config.rest or self._counts is not None
        return super().needs_no_scores(call) and not wanted

    def least_share(self) -> Tensor | float | None:
        """See the base class."""
        return None if self.config.budget == "fixed" else self.share

    def selection(self, call: Call) -> Selection:
        """Blocks that hold a global token are kept by all; groups that do keep all, and the others as many as ever."""
        selection, tokens = super().selection(call), self._global_tokens(call)
        if tokens is None:
            return selection
        known = valid_in_blocks(tokens, selection.num_blocks, selection.block_size).any(-1)[:, None, None, :]
        asking = valid_in_blocks(tokens, selection.num_groups, selection.query_group).any(-1)[:, None, :, None]
        return replace(selection, always_kept=selection.always_kept | ((known | asking) & selection.visible))

    def _global_tokens(self, call: Call) -> Tensor | None:
        if not self.config.global_tokens or call.mask.pattern != "bidirectional_self":
            return None
        return call.context.global_tokens

    def coarse(self, call: Call, backend: str) -> CoarseAttention | None:
        """Every window of this layer's stride as one token; None where there are none, or no whole window."""
        if self.coarse_keys is None or call.k.shape[2] < self.coarse_keys.stride:
            return None
        coarse: CoarseAttention = self.coarse_keys(call, backend)
        return coarse

    def rest_token(
        self, scores: Tensor, keep: Tensor, call: Call, selection: Selection, features: BlockFeatures
    ) -> tuple[Tensor, Tensor] | None:
        """See the base class: one token, the same for all rows of a group."""
        if not self.config.rest:
            return None
        if torch.is_grad_enabled() and self.detaches():  # part of the forward pass, its gradient stops nowhere
            features = self.features_with_gradient(call, selection, fused=False)
            factors = self.factors_with_gradient(call, features, selection)
            scores = block_scores(*factors, selection.num_blocks, self.reach(call, selection))
        assert features.num_tokens is not None
        log_size = features.num_tokens.flatten(1).expand(scores.shape[0], -1).clamp(min=1).log()
        if self.config.sub_blocks > 1 or self.config.index_dim:  # the scores of several rows hold their sizes
            log_size = torch.zeros_like(log_size)
        lse = log_mass(scores, selection.free & ~keep, log_size.to(scores.dtype))
        value = self.global_context(features, call.mask, selection)
        group = torch.arange(call.q.shape[2], device=scores.device) // selection.query_group
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

    def choose(self, scores: Tensor, call: Call, selection: Selection) -> Tensor:
        """Fixed budget as the base class; adaptive: the blocks whose share of the predicted mass reaches `share`."""
        if self._draws():
            # P(score + logistic noise > tau) is the p of soft_top_k, for noise of the same temperature.
            uniform = torch.rand(scores.shape, device=scores.device, dtype=scores.dtype)
            scores = scores + self.config.temperature * uniform.logit(torch.finfo(scores.dtype).eps)
        if self.config.budget == "fixed":
            return super().choose(scores, call, selection)
        return self._of_enough_share(scores, call, selection)

    def _of_enough_share(self, scores: Tensor, call: Call, selection: Selection) -> Tensor:
        """What is always kept, free blocks of at least `share` of the free mass, the next best up to `min_blocks`."""
        free = selection.free.expand_as(scores)
        mass = log_mass(scores, free, scores.new_zeros(scores.shape[0], scores.shape[-1])).unsqueeze(-1)
        if self._counts is not None:
            self._count(self._counts, scores - mass, call, selection)
        share = self.share
        least = mass + (share.to(mass.dtype).log() if isinstance(share, Tensor) else math.log(share))
        wanted = ((scores >= least) & free).logical_or_(selection.always_kept)
        budget = torch.minimum(wanted.sum(-1).clamp(min=self.config.min_blocks), selection.visible.sum(-1))
        short = (budget > wanted.sum(-1)).any(0).any(0)
        if scores.device.type != "cpu":
            return self.selector.best(scores, selection, budget)
        if bool(short.any()):  # few groups need to be sorted, as a rule those that see little
            wanted[:, :, short] = self.selector.best(
                scores[:, :, short], selection.of_groups(short), budget[:, :, short]
            )
        return wanted

    def _count(self, counts: ShareCounts, log_share: Tensor, call: Call, selection: Selection) -> None:
        """What every threshold would keep of this call, in tiles where lists are carried."""
        visible = selection.visible.expand_as(log_share)
        rows, tile = call.mask.valid_queries(call.q.shape[2]), self.selector.tile(call.mask)
        if rows is not None:
            real = valid_in_blocks(rows, selection.num_groups, selection.query_group).any(-1)
            visible = visible & real[:, None, :, None]
        floor = self.selector.best(log_share, selection, selection.visible.sum(-1).clamp(max=self.config.min_blocks))
        floor, log_share = floor & visible, log_share.masked_fill(~(selection.free & visible), -torch.inf)
        if tile is not None:
            around = (0, 0, call.mask.query_offset % tile, -(call.mask.query_offset + log_share.shape[2]) % tile)
            floor, visible = (pad(x, around).unflatten(2, (-1, tile)).any(3) for x in (floor, visible))
            log_share = pad(log_share, around, value=-torch.inf).unflatten(2, (-1, tile)).amax(3)
        counts.add(log_share, floor, visible)

    def selector_losses(
        self, scores: Tensor, keep: Tensor, layout: BlockLayout, call: Call, selection: Selection
    ) -> SelectorLosses:
        """See the base class; the losses are those of distillation and regularisation."""
        config, step = self.config, call.context.step
        learning = self.training and torch.is_grad_enabled()
        learned_by = self._gate_losses(scores, keep, layout, selection, learning=learning)
        losses = dict(learned_by.losses)
        if learning and config.lambda_density:
            error = density_error(scores, selection, config, self.density_at(step), self.share)
            losses["density"] = config.lambda_density * error
        weight = self._distill_weight(step)
        if learning and weight:
            losses["distill"] = weight * distillation(scores, call, selection, config.distill_fraction)
        return learned_by._replace(losses=losses)

    def _gate_losses(
        self, scores: Tensor, keep: Tensor, layout: BlockLayout, selection: Selection, *, learning: bool
    ) -> SelectorLosses:
        """What the differentiable top-k gives: logit bias, log-probability, entropy."""
        config = self.config
        wants_bias = config.estimator == "soft" or (config.estimator == "straight_through" and learning)
        policy = learning and config.estimator == "policy_gradient"
        whole = policy or (learning and config.lambda_entropy > 0)
        if not (wants_bias or whole):
            return SelectorLosses()
        bias, log_prob, losses = None, None, {}
        listed, free = layout.indices.long(), selection.free.expand_as(keep)
        row = None if layout.since is None else _first_rows(layout, scores.shape[2])
        some = None if row is None or whole else _chosen_in(row, layout, scores)
        log_p = self._gate(scores, keep, layout, selection, at=listed if row is None and not whole else None, rows=some)
        if wants_bias:
            if row is None:
                bias = log_p.gather(-1, listed) if whole else log_p
            else:
                bias = _of_rows(log_p, row, layout, some)
            bias = bias.masked_fill(~layout.slots, 0.0)
            if config.estimator == "straight_through":
                bias = bias - bias.detach()
        if policy:
            log_prob = log_probability(log_p, keep, free)
        if learning and config.lambda_entropy:
            losses["entropy"] = config.lambda_entropy * binary_entropy(log_p, free)
        return SelectorLosses(bias, losses, log_prob)

    def _draws(self) -> bool:
        """Whether this call keeps blocks by scores plus noise."""
        return self.training and (self.config.sample or self.config.estimator == "policy_gradient")

    def _gate(
        self,
        scores: Tensor,
        keep: Tensor,
        layout: BlockLayout,
        selection: Selection,
        *,
        at: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities of the differentiable top-k, of all blocks or those `at`; `(rows, blocks)` of some `rows`.

        It counts with the free blocks that were kept, but with no more than the schedule ends with. So steps at a
        higher density already teach the last one's choice, dense steps best of all: there the task's gradient says of
        every block whether more of it would help. A gate that is felt in the forward pass ("soft"), and the
        probability of a choice, have to agree with what is kept.
        """
        always_kept = selection.always_kept.sum(-1)
        kept = (layout.counts if layout.since is None else keep.sum(-1)) - always_kept
        if self.config.budget == "fixed" and self.config.estimator not in ("soft", "policy_gradient"):
            final = self.selector.budget(selection.visible.sum(-1), self.density_at(self.config.density_steps))
            kept = torch.minimum(kept, (final - always_kept).clamp(min=1))
        if rows is None:
            return soft_top_k(scores, kept, selection.free, self.config.temperature, at=at)
        scores, kept, free = (
            x.expand(scores.shape[:3] + x.shape[3:]).flatten(0, 2).index_select(0, rows)
            for x in (scores, kept, selection.free)
        )
        return soft_top_k(scores, kept, free, self.config.temperature)

    def _distill_weight(self, step: int) -> float:
        config = self.config
        if not config.distill_decay_steps:
            return config.distill_weight
        return config.distill_weight * max(0.0, 1.0 - step / config.distill_decay_steps)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """Kept blocks (fixed budget), coarse tokens, scores, features; without the training-only distillation.

        By the method: where the CPU kernel computes all pairs and picks the listed ones, it does more.
        """
        shape, rank = self.shape, self.config.rank
        group = self.selector.query_group(mask)
        groups, blocks = -(-query_length // group), -(-key_length // self.config.block_size)
        width = shape.head_dim + rank + 2 * self.config.patterns
        if self.config.sub_blocks > 1:
            blocks, width = blocks * self.config.sub_blocks, width + 1
        described = 2 * groups * (2 * shape.head_dim + 1) * rank
        features = 2 * -(-key_length // self.config.block_size) * 4 * shape.head_dim * rank
        if self.config.index_dim:
            blocks, width = key_length, self.config.index_dim + 1 + 2 * self.config.patterns
            described = 2 * groups * shape.head_dim * self.config.index_dim
            features = 2 * key_length * shape.head_dim * self.config.index_dim
        per_head = 2 * groups * blocks * width + described
        predictor = batch * (shape.num_heads * per_head + shape.num_kv_heads * features)
        coarse = 0
        if self.coarse_keys is not None:
            coarse = self.coarse_keys.flops(batch, shape.num_heads, query_length, key_length, shape.head_dim, mask)
        kept = super().flops(batch, query_length, key_length, mask)
        return None if kept is None else kept + predictor + coarse


def _first_rows(layout: BlockLayout, rows: int) -> Tensor:
    """int64 `(batch, heads, tiles, width)`: the row of this call that chose each carried block first; -1 for none."""
    assert layout.since is not None
    tile = layout.query_group
    first = torch.arange(layout.num_groups, device=layout.since.device)[:, None] * tile - layout.query_offset % tile
    row = first + layout.since.long()
    return row.masked_fill_(~((row >= 0) & (row < rows) & layout.slots), -1)


def _chosen_in(row: Tensor, layout: BlockLayout, scores: Tensor) -> Tensor | None:
    """int64 `(n,)`: which rows of `scores.flatten(0, 2)` chose a block first, a third of all; None on a GPU.

    There their number would have to be waited for.
    """
    if scores.device.type != "cpu":
        return None
    chose = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)
    chose.scatter_(-1, row.flatten(2).masked_fill(row.flatten(2) < 0, scores.shape[2]), True)
    return chose[..., :-1].flatten().nonzero().squeeze(-1)


def _of_rows(log_p: Tensor, row: Tensor, layout: BlockLayout, some: Tensor | None) -> Tensor:
    """`(batch, heads, tiles, width)`: each carried block's log-probability in the row that chose it first.

    So all rows of a tile that see a block tell that row what it was worth to them. 0 for a block that was chosen
    before this call.

    Args:
        log_p: From `_gate`, of all rows or of some.
        row: From `_first_rows`.
        layout: The lists.
        some: Which rows those are, from `_chosen_in`.
    """
    rows, blocks = layout.query_length, log_p.shape[-1]
    heads = row.shape[0] * row.shape[1]
    head = torch.arange(heads, device=row.device).view(*row.shape[:2], 1, 1)
    flat = head * rows + row.clamp(min=0)
    if some is not None:
        place = torch.zeros(heads * rows, dtype=torch.long)
        place[some] = torch.arange(len(some))
        flat = place[flat]
    found = log_p.flatten()[(flat * blocks + layout.indices.long()).flatten()] if log_p.numel() else log_p.new_zeros(1)
    return found.expand(row.numel()).view(row.shape).masked_fill(row < 0, 0.0)
