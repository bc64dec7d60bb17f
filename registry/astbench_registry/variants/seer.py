"""SeerAttention: a block gate distilled from dense attention (Gao et al. 2024, arXiv 2410.13276)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from astbench_kernels.layout import ceil_div
from astbench_registry.block_selection import BlockSelectingAttention, Call, Selection, block_scores
from astbench_registry.block_selection.dense_layers import attend_densely
from astbench_registry.block_selection.dense_weights import dense_weights, rows_at_a_time
from astbench_registry.block_selection.pooling import (
    block_mean,
    extremes_of_blocks,
    in_blocks,
    mean_of_blocks,
    valid_in_blocks,
)
from astbench_registry.configs.seer import SeerConfig
from astbench_registry.interface import AttentionContext, AttentionOutput, AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.widening import widened


class SeerAttention(BlockSelectingAttention):
    """Blocks by a learned gate on pooled queries and keys; trained by distillation, used sparsely afterwards.

        A = softmax((W_q P_q(Q)) (W_k P_k(K))^T / sqrt(gate_dim)),
        P_q = mean of a group's queries,   P_k = [max; min; mean] of a block's keys              (section 3.1)
        loss = KL(T || A),   T = softmax(Q K^T / sqrt(d)), maximum over group and block, rows divided by their sums
                                                                                                 (section 3.2)

    W_q is learned per query head, W_k per key/value head. While training the layer is dense attention, as in the
    paper, and its loss the only one that reaches the gate: train it on a dense model with --optim.train=attention.
    Otherwise each group attends to the blocks of largest gate (`density`, `top_k`) or to all above `threshold`.

    Causality: a group's mean query knows its last token. With `query_group` 1, the default under a causal mask, each
    token speaks for itself and no choice depends on the future; a larger `query_group`, 64 in the paper, is its
    prefill as published and is declared not strictly causal. Only completed blocks compete in either case.

    Differences from the paper:

    * The backbone hands q and k over with their rotary encoding, if they have one, and the gate pools them so. The
      paper pools them before it and turns the pooled ones by the position of their block.
    * The blocks that a group itself stands in, and others that the options keep always, take no part in A and T. In
      the paper all compete; a pooled key of the own block would hold future keys.
    * The paper's loss is the mean over all rows of A; here, over those with two blocks or more to choose from.
    * T is computed from q and k a few rows at a time, in one more pass over all pairs. The paper has a kernel that
      pools while it computes dense attention, so its training is the faster one.
    * Queries and keys reach the gate without gradient: the backbone is not taught to be easy to gate.
    * Patterns other than causal self-attention, padding, and gates shared over the heads of a group of key/value
      heads are not in the paper; the first two are as in the other selectors here, the last is not there.
    """

    config: SeerConfig

    def __init__(self, config: SeerConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        width = config.gate_dim or shape.head_dim
        self.query_gate = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim, width))
        self.key_gate = nn.Parameter(torch.empty(shape.num_kv_heads, 3 * shape.head_dim, width))
        for weight in (self.query_gate, self.key_gate):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """See the base class; while training, dense attention and the loss of the gate, in O(N M)."""
        if not self.training:
            return super().forward(q, k, v, mask, scale=scale, context=context)
        call = Call.of(self.shape, q, k, v, mask, scale, context)
        selection = self.selection(call)
        dense = attend_densely(call, selection, tiled=self.selector.tile(mask) is not None)
        if not torch.is_grad_enabled():
            return dense
        with torch.autocast(q.device.type, enabled=False):
            call = call.without_padding().detached()
            loss = _divergence(self.scores(call, selection), _pooled_attention(call, selection), selection)
        return dense._replace(losses={"distill": self.config.distill_weight * loss})

    def scores(self, call: Call, selection: Selection) -> Tensor:
        """Logits of the gate. Time O(M) for the features, O(groups x blocks) for the scores."""
        query, k, mask = _pooled_queries(call, selection), call.k, call.mask
        key = torch.cat([*extremes_of_blocks(k, mask, selection), mean_of_blocks(k, mask, selection)], -1)
        query = torch.matmul(query, widened(self.query_gate, query.dtype))
        key = torch.matmul(key, widened(self.key_gate, key.dtype))
        return block_scores(query, key) * query.shape[-1] ** -0.5

    def choose(self, scores: Tensor, call: Call, selection: Selection) -> Tensor:
        """By budget as the base class, or all blocks whose gate reaches the threshold, `min_blocks` at least."""
        threshold = self.config.threshold
        if threshold is None:
            return super().choose(scores, call, selection)
        wanted = (_log_gate(scores, selection).exp() >= threshold) | selection.always_kept
        floor = selection.visible.sum(-1).clamp(max=self.config.min_blocks)
        # The gate grows with the score: its blocks above the threshold are the best ones.
        return self.selector.best(scores, selection, wanted.sum(-1).maximum(floor))

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """Kept blocks (fixed budget), the gate's two linear maps and its scores; not the training's dense attention."""
        shape, width = self.shape, self.query_gate.shape[-1]
        group = self.selector.query_group(mask)
        groups, blocks = ceil_div(query_length, group), ceil_div(key_length, self.config.block_size)
        queries = 2 * shape.num_heads * groups * width * (shape.head_dim + blocks)
        keys = 2 * shape.num_kv_heads * blocks * 3 * shape.head_dim * width
        kept = super().flops(batch, query_length, key_length, mask)
        return None if kept is None else kept + batch * (queries + keys)


def _pooled_queries(call: Call, selection: Selection) -> Tensor:
    """Mean of each group's real queries, under every mask: `(batch, num_heads, groups, head_dim)`."""
    q, group, groups = call.q, selection.query_group, selection.num_groups
    valid = call.mask.valid_queries(q.shape[2])
    if valid is None:
        valid = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    return block_mean(in_blocks(q.to(call.compute_dtype), groups, group), valid_in_blocks(valid, groups, group))


def _pooled_attention(call: Call, selection: Selection) -> Tensor:
    """Dense attention, maximum over each group and block: `(batch, num_heads, groups, blocks)`."""
    q, k, group, blocks = call.q, call.k, selection.query_group, selection.num_blocks
    missing = blocks * selection.block_size - k.shape[2]
    pooled = []
    for rows in torch.arange(q.shape[2], device=q.device).split(max(1, rows_at_a_time(q, k) // group) * group):
        weights = pad(dense_weights(call, rows), (0, missing)).unflatten(-1, (blocks, -1)).amax(-1)
        pooled.append(pad(weights, (0, 0, 0, -len(rows) % group)).unflatten(2, (-1, group)).amax(3))
    return torch.cat(pooled, 2)


def _log_gate(scores: Tensor, selection: Selection) -> Tensor:
    """Log A over the blocks that there is a choice about, -inf on all others."""
    free = selection.free.expand_as(scores)
    some = free.any(-1, keepdim=True)
    return scores.masked_fill(~free & some, -torch.inf).log_softmax(-1).masked_fill(~free, -torch.inf)


def _divergence(scores: Tensor, attention: Tensor, selection: Selection) -> Tensor:
    """KL(T || A) over the blocks that there is a choice about, mean over the groups that have one.

    Args:
        scores: Logits of the gate, `(batch, num_heads, groups, blocks)`.
        attention: Pooled dense attention of that shape, without gradient.
        selection: Groups and blocks.
    """
    free = selection.free.expand_as(scores)
    target = attention.masked_fill(~free, 0.0)
    total = target.sum(-1, keepdim=True)
    live = (total > 0) & (free.sum(-1, keepdim=True) > 1)
    target = (target / total.clamp(min=torch.finfo(target.dtype).tiny)).masked_fill(~live, 0.0)
    log_gate = _log_gate(scores, selection).masked_fill(~free, 0.0)
    return (torch.special.xlogy(target, target) - target * log_gate).sum() / live.sum().clamp(min=1)
