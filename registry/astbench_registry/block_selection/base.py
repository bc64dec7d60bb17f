"""What the variants that pick key blocks share: groups, budgets, always-kept blocks, layout, kernel call.

A variant fills in :meth:`BlockSelectingAttention.scores`, or, where the score is a dot product,
:meth:`BlockSelectingAttention.summarise` and :meth:`BlockSelectingAttention.factors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from astbench_kernels import (
    BlockLayout,
    block_sparse_attention,
    choose_backend,
    merge_attention,
    select_blocks,
    what_runs,
)
from astbench_kernels.layout import ceil_div
from astbench_kernels.triton import choose_blocks
from astbench_kernels.triton.selection.rule import BlockRule
from astbench_registry.block_selection.coarse_keys import CoarseAttention
from astbench_registry.block_selection.grid import Grid, Selection
from astbench_registry.block_selection.pooling import block_mean, first_valid, in_blocks, valid_in_blocks
from astbench_registry.block_selection.scores import block_scores
from astbench_registry.block_selection.summaries import BlockSummaries
from astbench_registry.configs.block_selection import BlockSelectionConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionStats
from astbench_registry.mask import AttentionMask

BIDIRECTIONAL_GROUP = 64
"""Default queries per choice where a group may be pooled; under sequential masks it is 1."""


class Taught(NamedTuple):
    """How the scores of a choice learn.

    Attributes:
        bias: `(batch, num_heads, groups, width)`, the kernel's `block_bias`, through which the task's gradient comes.
        losses: Auxiliary losses.
        log_prob: As in :class:`AttentionOutput`.
        rest: What :meth:`BlockSelectingAttention.rest` returns.
    """

    bias: Tensor | None = None
    losses: Mapping[str, Tensor] = MappingProxyType({})
    log_prob: Tensor | None = None
    rest: tuple[Tensor, Tensor] | None = None


class BlockSelectingAttention(Attention):
    """Scores key blocks per query group, keeps the best within a budget, attends to nothing else.

    Under a sequential mask (causal self-attention, or cross-attention from a decoder) a group's first token
    (the first that is no padding) speaks for it, and only completed blocks, all of whose keys precede the
    group, compete; the blocks that the group itself stands in are always kept and masked per token. So no
    choice depends on later tokens (in groups of several only on how many of its own group there are). Pooling a causal
    group's queries would leak them. Without such a mask the group's mean query speaks.
    """

    config: BlockSelectionConfig

    def summarise(
        self, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, *, fused: bool
    ) -> tuple[Tensor, ...] | None:
        """What the score of a block is made of on the keys' side; None for a variant whose scores are no dot products.

        Tensors `(batch, kv_heads or 1, rows, d)`, with one row a block, or the same number of consecutive ones. Nothing
        but a block's own keys and values, and weights, may enter its rows: while decoding, those of completed blocks
        are kept.

        Args:
            k: Keys, and `v` the values, as :meth:`forward` takes them; zeros where there is padding.
            v: Values.
            mask: What is padding; no more of it may be looked at.
            grid: The blocks.
            fused: The Triton kernels may pool the blocks; there is no gradient.
        """
        return None

    def factors(
        self, q: Tensor, blocks: tuple[Tensor, ...], mask: AttentionMask, grid: Grid, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Both sides of scores that are dot products, float32 or float64.

        `(batch, num_heads, groups, d)` for the groups and `(batch, kv_heads, blocks, d)` for the blocks, or the
        same number of consecutive rows for every block, whose score is then the log of their summed exponentials.

        Args:
            q: Queries; zeros where there is padding.
            blocks: From :meth:`summarise`.
            mask: What may be seen.
            grid: Groups and blocks.
            scale: Factor on q . k.
        """
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        selection: Selection,
        scale: float,
    ) -> Tensor:
        """Score every block for every group: `(batch, num_heads, groups, blocks)`, float32 or float64.

        Scores of blocks that are no candidates are never looked at, but must be finite.
        """
        blocks = self.summarise(k, v, mask, selection, fused=False)
        if blocks is None:
            raise NotImplementedError(f"{type(self).__name__} has neither factors nor scores")
        return block_scores(*self.factors(q, blocks, mask, selection, scale), selection.num_blocks)

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
        """See the base class. Time O(N x kept keys), and O(groups x blocks) for the choice."""
        context = context or AttentionContext()
        scale = self.shape.head_dim**-0.5 if scale is None else scale
        backend = choose_backend(self.config.backend, q.device, dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1]))
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = mask.without_padding(q, k, v)
            fused = backend == "triton" and not self.needs_scores()
            layout = self.fused_layout(q, k, v, mask, scale, context) if fused else None
            taught = Taught()
            if layout is None:
                layout, taught = self.taught_layout(q, k, v, mask, scale, context)
            coarse = self.coarse(q, k, v, mask, scale, backend)
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            layout,
            block_bias=taught.bias,
            scale=scale,
            causal=mask.causal,
            key_valid=mask.key_valid,
            backend=backend,
        )
        others = [] if coarse is None else [(coarse.out, coarse.lse)]
        if taught.rest is not None:
            others.append(taught.rest)
        if others:
            out, _ = merge_attention([(out, lse), *others])
        stats = None
        if context.listen:
            ran = what_runs(backend, q, k, v, layout, causal=mask.causal, block_bias=taught.bias)
            stats = self._stats(q, k, mask, layout, coarse, taught.rest, ran)
        return AttentionOutput(out, taught.losses, stats, taught.log_prob)

    def taught_layout(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, context: AttentionContext
    ) -> tuple[BlockLayout, Taught]:
        """The choice by scores that a variant may learn from, and what :meth:`teach` makes of them."""
        selection = self.with_fixed_blocks(self.selection(q, k, mask), mask, context)
        blocks = self._summaries(k, v, mask, selection, context, fused=False)
        if blocks is None:
            scores = self.scores(q, k, v, mask, selection, scale)
        else:
            scores = block_scores(*self.factors(q, blocks, mask, selection, scale), selection.num_blocks)
        keep = self.choose(scores.detach(), selection, context)
        layout = selection.layout(keep, q, k, mask)
        taught = self.teach(scores, keep, layout, q, k, v, mask, selection, scale, context)
        if blocks is not None:
            taught = taught._replace(rest=self.rest(scores, keep, blocks, q, k, v, mask, selection, scale))
        return layout, taught

    def needs_scores(self) -> bool:
        """Whether anything but keeping each row's best hangs on the scores.

        A variant that overrides :meth:`choose` or :meth:`teach` says here when that makes a difference.
        """
        return self.training and torch.is_grad_enabled()

    @torch.no_grad()
    def fused_layout(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, context: AttentionContext
    ) -> BlockLayout | None:
        """The same choice by kernels that keep no scores and wait for nothing; None where they cannot make it.

        They need :meth:`factors`, and what follows from those as it is written here.
        """
        if type(self).selection is not BlockSelectingAttention.selection:
            return None
        grid, config = self.grid(q, k, mask), self.config
        blocks = self._summaries(k, v, mask, grid, context, fused=True)
        if blocks is None:
            return None
        factors = self.factors(q, blocks, mask, grid, scale)
        if factors[1].shape[2] != grid.num_blocks:
            return None
        rule = BlockRule(
            block_size=grid.block_size,
            query_group=grid.query_group,
            query_length=q.shape[2],
            key_length=k.shape[2],
            query_offset=mask.query_offset,
            causal=mask.causal,
            local_blocks=None if mask.cross else config.local_blocks,
            first_block=config.first_block,
        )
        seen = None
        if mask.key_valid is not None:
            seen = valid_in_blocks(mask.key_valid, grid.num_blocks, grid.block_size).any(-1)
        return choose_blocks(*factors, rule, lambda visible: self.budget(visible, context), seen=seen)

    def _summaries(
        self, k: Tensor, v: Tensor, mask: AttentionMask, grid: Grid, context: AttentionContext, *, fused: bool
    ) -> tuple[Tensor, ...] | None:
        """:meth:`summarise` of all blocks, save those that the caller keeps; None where the scores are no products."""
        if type(self).scores is not BlockSelectingAttention.scores:
            return None
        summarise = partial(self.summarise, fused=fused)
        kept = context.summaries
        if isinstance(kept, BlockSummaries) and (mask.causal or mask.cross) and not torch.is_grad_enabled():
            return kept.completed(k, v, mask, grid, summarise)
        return summarise(k, v, mask, grid)

    def grid(self, q: Tensor, k: Tensor, mask: AttentionMask) -> Grid:
        """Groups and blocks."""
        group = self.config.query_group or (1 if mask.sequential else BIDIRECTIONAL_GROUP)
        if mask.query_offset % group:
            raise ValueError(
                f"decoding from position {mask.query_offset} needs the first query of its group of {group}, "
                "which is no longer there; set --attention.query_group=1 to decode"
            )
        groups = ceil_div(q.shape[2], group)
        return Grid(
            block_size=self.config.block_size,
            query_group=group,
            num_blocks=ceil_div(k.shape[2], self.config.block_size),
            num_groups=groups,
            first=torch.arange(groups, device=q.device) * group + mask.query_offset,
        )

    def selection(self, q: Tensor, k: Tensor, mask: AttentionMask) -> Selection:
        """Groups, blocks and what each group may, must and need not see."""
        config, device, grid = self.config, q.device, self.grid(q, k, mask)
        size, blocks, first = grid.block_size, grid.num_blocks, grid.first
        last = (first + grid.query_group - 1).clamp(max=mask.query_offset + q.shape[2] - 1)
        start = torch.arange(blocks, device=device) * size
        stop = start + size
        visible = torch.ones(grid.num_groups, blocks, dtype=torch.bool, device=device)
        complete, forced = visible, torch.zeros_like(visible)
        if mask.causal:
            visible = start <= last[:, None]
            complete = stop <= first[:, None]
        if not mask.cross:
            reach = config.local_blocks * size
            forced = (start <= last[:, None] + reach) & (stop > first[:, None] - reach)
        if config.first_block:
            forced = forced | (start == 0)
        visible = visible[None, None]
        if mask.key_valid is not None:
            seen = valid_in_blocks(mask.key_valid, blocks, size).any(-1)
            visible = visible & seen[:, None, None, :]
        return Selection(
            **vars(grid),
            visible=visible,
            forced=forced & visible,
            candidates=complete & visible,
        )

    def with_fixed_blocks(self, selection: Selection, mask: AttentionMask, context: AttentionContext) -> Selection:
        """The same with more blocks forced, for variants that fix some by what the task says of the tokens.

        The kernels that choose know nothing of those: such a variant's :meth:`fused_layout` returns None for them.
        """
        return selection

    def budget(self, visible_blocks: Tensor, context: AttentionContext) -> Tensor:
        """int64, as `visible_blocks`: how many blocks a row with that many visible ones keeps."""
        config = self.config
        if config.top_k is not None:
            wanted = torch.full_like(visible_blocks, config.top_k)
        else:
            # The small term keeps 0.25 * 8 at 2, whatever floating point makes of it.
            wanted = torch.ceil(visible_blocks * self.density_at(context.step) - 1e-6).long()
        return torch.minimum(wanted.clamp(min=config.min_blocks), visible_blocks)

    def density_at(self, step: int) -> float:
        """Density to keep after `step` optimizer steps."""
        return self.config.density

    def choose(self, scores: Tensor, selection: Selection, context: AttentionContext) -> Tensor:
        """Bool `(batch, num_heads, groups, blocks)`: the blocks to keep."""
        budget = self.budget(selection.visible.sum(-1), context)
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
        """How the scores are to learn, for variants that learn to choose."""
        return Taught()

    def coarse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, backend: str
    ) -> CoarseAttention | None:
        """Attention to coarse tokens that joins the softmax, for variants that have them; None for nothing."""
        return None

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
        """What stands in the softmax for all that was not kept, for variants that have it; None for nothing.

        Args:
            scores: `(batch, num_heads, groups, blocks)`.
            keep: Bool, as `scores`.
            blocks: From :meth:`summarise`.
            q: Queries, and `k` keys, `v` values.
            k: Keys.
            v: Values.
            mask: What may be seen.
            selection: What there is a choice among.
            scale: Factor on q . k.

        Returns:
            Output `(batch, num_heads, query_length, value_dim)` and log-sum-exp `(batch, num_heads, query_length)`.
        """
        return None

    def speaker(self, q: Tensor, mask: AttentionMask, grid: Grid) -> Tensor:
        """`(batch, num_heads, groups, head_dim)`, float32 or more: the query that speaks for each group."""
        group = grid.query_group
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        valid = mask.valid_queries(q.shape[2])
        if group == 1 or (mask.sequential and valid is None):
            return wide[:, :, ::group]
        if valid is None:
            valid = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
        if mask.sequential:
            rows = first_valid(valid, grid.num_groups, group)[:, None, :, None]
            return wide.take_along_dim(rows, 2)
        # Not a product with zero: padding may hold NaN.
        wide = wide.masked_fill(~valid[:, None, :, None], 0.0)
        groups = grid.num_groups
        return block_mean(in_blocks(wide, groups, group), valid_in_blocks(valid, groups, group))

    def _stats(
        self,
        q: Tensor,
        k: Tensor,
        mask: AttentionMask,
        layout: BlockLayout,
        coarse: CoarseAttention | None,
        rest: tuple[Tensor, Tensor] | None,
        backend: str,
    ) -> AttentionStats:
        attended = layout.attended_pairs(causal=mask.causal, key_valid=mask.key_valid)
        pooled = None
        if coarse is not None:
            pooled = coarse.layout.attended_pairs(causal=mask.causal, key_valid=coarse.key_valid)
            pooled = pooled.expand_as(attended)
        if rest is not None:
            one_a_row = (rest[1] > -torch.inf).sum(-1).to(attended.dtype)
            pooled = one_a_row if pooled is None else pooled + one_a_row
        return AttentionStats(attended, mask.visible_pairs(q, k), backend, layout, pooled)

    def kept_keys(self, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Keys gathered over all rows of one head under the fixed budget."""
        group = self.config.query_group or (1 if mask.sequential else BIDIRECTIONAL_GROUP)
        first = torch.arange(ceil_div(query_length, group)) * group + mask.query_offset
        blocks = torch.full_like(first, ceil_div(key_length, self.config.block_size))
        if mask.causal:
            last = (first + group).clamp(max=mask.query_offset + query_length)
            blocks = -(-last // self.config.block_size)
        return int(self.budget(blocks, AttentionContext()).sum()) * group * self.config.block_size

    def planned_backend(self, device: torch.device) -> str:
        """The block-sparse kernel for this device."""
        chosen = self.config.backend
        return f"{choose_backend(chosen, device)} ({'auto' if chosen == 'auto' else 'asked for'})"

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """The kept blocks' two matmuls (fixed budget), without the scores; variants add theirs."""
        kept = self.kept_keys(query_length, key_length, mask)
        return 4 * batch * self.shape.num_heads * kept * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache: any block may be chosen later."""
        return self.kv_cache_size(key_length)
