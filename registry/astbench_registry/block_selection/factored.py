"""Block selection by scores that are dot products: fused on a GPU, its block features kept while decoding."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from astbench_kernels import BlockLayout
from astbench_kernels.layout import ceil_div
from astbench_kernels.triton import carried_refusals, choose_blocks, choose_carried
from astbench_kernels.triton.selection.rule import BlockRule
from astbench_registry.block_selection.base import BlockSelectingAttention, Choice
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.features import BlockFeatures
from astbench_registry.block_selection.grid import Grid, Selection
from astbench_registry.block_selection.pooling import block_mean, first_valid, in_blocks, valid_in_blocks
from astbench_registry.block_selection.scores import block_scores
from astbench_registry.block_selection.summaries import BlockSummaries

SCORES_AT_A_TIME = 2**19
"""Scores that rows choose by at a time on a CPU, where nothing else is wanted of them: 2 MB."""


class FactoredBlockSelection(BlockSelectingAttention):
    """Score of group i and block j = row_i . column_j, rows from the queries and columns from the keys.

    Attributes:
        pool: Where there are several columns a block: how many consecutive ones are max-pooled.
    """

    pool = 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        base = FactoredBlockSelection
        if cls.scores is not base.scores:
            raise TypeError(f"{cls.__name__} has scores of its own: derive it from BlockSelectingAttention instead")
        changed = [
            name for name in ("selection", "choose", "rest_token") if getattr(cls, name) is not getattr(base, name)
        ]
        if changed and cls.fusible is base.fusible:
            raise TypeError(
                f"{cls.__name__} changes {', '.join(changed)}(): its fusible() has to say when that matters"
            )

    @property
    def columns_per_block(self) -> int:
        """Consecutive rows of the key side that one block has, see :meth:`factors`."""
        return 1

    @abstractmethod
    def block_features(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """The blocks' side of the scores.

        Args:
            call: Zeros where there is padding. Of the mask nothing but what is padding may be looked at.
            grid: The blocks.
            fused: The Triton kernels may pool the blocks; there is no gradient.
        """
        raise NotImplementedError

    @abstractmethod
    def factors(self, call: Call, features: BlockFeatures, grid: Grid) -> tuple[Tensor, Tensor]:
        """Both sides of the scores, float32 or float64.

        `(batch, num_heads, groups, d)` for the groups and `(batch, kv_heads, blocks, d)` for the blocks, or the
        same number of consecutive rows for every block, whose score is then the log of their summed exponentials.

        Args:
            call: Zeros where there is padding.
            features: From :meth:`block_features`.
            grid: Groups and blocks.
        """
        raise NotImplementedError

    def scores(self, call: Call, selection: Selection) -> Tensor:
        """See the base class: products of the factors."""
        return self._products(call, self.block_features(call, selection, fused=False), selection)

    def rest_token(
        self, scores: Tensor, keep: Tensor, call: Call, selection: Selection, features: BlockFeatures
    ) -> tuple[Tensor, Tensor] | None:
        """What stands in the softmax for all that was not kept, for variants that have it; None for nothing.

        Args:
            scores: `(batch, num_heads, groups, blocks)`.
            keep: Bool, as `scores`.
            call: Zeros where there is padding.
            selection: What there was a choice among.
            features: From :meth:`block_features`.

        Returns:
            Output `(batch, num_heads, query_length, value_dim)` and log-sum-exp `(batch, num_heads, query_length)`.
        """
        return None

    def fusible(self, call: Call) -> bool:
        """Whether the kernels that keep no scores make the same choice in this call.

        They keep each row's best by the factors, within the budget, and nothing learns from it; for carried lists also
        by several rows a block, and by :meth:`least_share`. A variant that overrides :meth:`selection`,
        :meth:`choose`, :meth:`selector_losses` or :meth:`rest_token`, or has several rows a block, says here when that
        makes a difference.
        """
        return not (self.training and torch.is_grad_enabled())

    def choice(self, call: Call, backend: str) -> Choice:
        """See the base class; by the fused kernels where they make the same choice."""
        if backend.startswith("triton") and self.fusible(call):
            tile = self.selector.tile(call.mask)
            layout = self.fused_layout(call) if tile is None else self.fused_carried_layout(call, tile)
            if layout is not None:
                return Choice(layout)
        if self.needs_no_scores(call):
            return Choice(self._layout_in_parts(call))
        selection = self.selection(call)
        features = self._known_features(call, selection, fused=False)
        scores = self._products(call, features, selection)
        keep = self.choose(scores.detach(), call, selection)
        layout = self.layout(keep, call, selection)
        learned_by = self.selector_losses(scores, keep, layout, call, selection)
        return Choice(layout, learned_by, self.rest_token(scores, keep, call, selection, features))

    def needs_no_scores(self, call: Call) -> bool:
        """Whether nothing but the lists is wanted of the scores of a causal call on a CPU.

        Then a few rows at a time choose, with the keys that they see: their scores stay in its cache. Never in
        training: a checkpointed layer chooses twice, and must choose the same. A subclass that changes `choose`,
        `rest_token` or `selector_losses` is asked for all scores, unless it says otherwise here.
        """
        said_by = next(cls for cls in type(self).__mro__ if "needs_no_scores" in vars(cls))
        changed = any(
            getattr(type(self), name) is not getattr(said_by, name)
            for name in ("choose", "rest_token", "selector_losses")
        )
        on_cpu = call.mask.causal and call.q.device.type == "cpu"
        return on_cpu and not changed and not (self.training or torch.is_grad_enabled())

    def _layout_in_parts(self, call: Call) -> BlockLayout:
        """See :meth:`needs_no_scores`. A part is a call of its own, as of a prompt that is read in pieces."""
        grid, tile = self.selector.grid(call), self.selector.tile(call.mask) or 1
        # Whole blocks: whether one holds a real key must not depend on where a part ends.
        together = math.lcm(tile, grid.query_group, grid.block_size)
        rows = SCORES_AT_A_TIME // max(1, call.q.shape[0] * call.q.shape[1] * grid.num_blocks) * grid.query_group
        rows = max(1, rows // together) * together
        start, end = call.mask.query_offset, call.mask.query_offset + call.q.shape[2]
        # Also where no score is needed: a cache's summaries have to hear of every key that is new.
        features = self._known_features(call, grid, fused=False)
        layouts: list[BlockLayout] = []
        while start < end or not layouts:
            stop = min(end, (start // rows + 1) * rows)
            part = call if stop - start == call.q.shape[2] else call.queries_between(start, stop)
            selection = self.selection(part)
            if self.least_share() is None and self.selector.keeps_all(selection, self.density_at(call.context.step)):
                keep = (selection.always_kept | selection.candidates).expand(*part.q.shape[:2], -1, -1)
            else:
                scores = self._products(part, features.first(selection.num_blocks, grid.num_blocks), selection)
                keep = self.choose(scores, part, selection)
            layouts.append(self.layout(keep, part, selection))
            start = stop
        return layouts[0] if len(layouts) == 1 else BlockLayout.joined(layouts, call.k.shape[2])

    @torch.no_grad()
    def fused_layout(self, call: Call) -> BlockLayout:
        """The choice by kernels that keep no scores and wait for nothing; see :meth:`fusible`."""
        grid = self.selector.grid(call)
        rows, columns = self.factors(call, self._known_features(call, grid, fused=True), grid)
        if columns.shape[2] != grid.num_blocks:
            raise NotImplementedError(f"{type(self).__name__} has several rows a block: its fusible() has to say no")
        budget = partial(self.selector.budget, density=self.density_at(call.context.step))
        return choose_blocks(rows, columns, self._rule(call, grid), budget, seen=_seen_blocks(call, grid))

    @torch.no_grad()
    def fused_carried_layout(self, call: Call, tile: int) -> BlockLayout | None:
        """The same for lists that tiles carry; None where the kernels do not serve the call.

        They do not where it begins inside a tile, as a step of decoding does, nor rows of very many blocks.
        """
        grid, share = self.selector.grid(call), self.least_share()
        rule = self._rule(call, grid)
        if carried_refusals(rule, tile, self.columns_per_block, self.pool):
            return None
        rows, columns = self.factors(call, self._known_features(call, grid, fused=True), grid)
        budget = partial(self.selector.budget, density=self.density_at(call.context.step))
        if share is not None:
            budget = partial(torch.clamp, max=self.config.min_blocks)
        layout = choose_carried(
            rows,
            columns,
            rule,
            tile,
            budget,
            pool=self.pool,
            share=share,
            seen=_seen_blocks(call, grid),
            real=call.mask.valid_queries(call.q.shape[2]),
        )
        kept = call.context.summaries
        if isinstance(kept, BlockSummaries):
            kept.running.remember(call, layout)
        return layout

    def least_share(self) -> Tensor | float | None:
        """The share of a row's free mass from which on a block is kept; None where the budget is a number of blocks."""
        return None

    def _rule(self, call: Call, grid: Grid) -> BlockRule:
        """What follows from positions, as the kernels take it."""
        mask, config = call.mask, self.config
        return BlockRule(
            block_size=grid.block_size,
            query_group=grid.query_group,
            query_length=call.q.shape[2],
            key_length=call.k.shape[2],
            query_offset=mask.query_offset,
            causal=mask.causal,
            local_blocks=None if mask.cross else config.local_blocks,
            sink_block=config.sink_block,
        )

    def _products(self, call: Call, features: BlockFeatures, grid: Grid) -> Tensor:
        factors = self.factors(call, features, grid)
        return block_scores(*factors, grid.num_blocks, self.reach(call, grid), self.pool)

    def reach(self, call: Call, grid: Grid) -> Callable[[int], int] | None:
        """How many blocks the first n groups may see at most; None for all."""
        if not call.mask.causal:
            return None
        return lambda groups: ceil_div(call.mask.query_offset + groups * grid.query_group, grid.block_size)

    def _known_features(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """:meth:`block_features` of all blocks, computed for those that the caller does not keep."""
        features_of = partial(self.block_features, fused=fused)
        known = call.context.summaries
        appended = call.mask.causal or call.mask.cross
        if isinstance(known, BlockSummaries) and appended and not torch.is_grad_enabled():
            return known.completed(call, grid, features_of)
        return features_of(call, grid)

    def group_query(self, call: Call, grid: Grid) -> Tensor:
        """`(batch, num_heads, groups, head_dim)`, float32 or more: the query that speaks for each group."""
        q, mask, group, groups = call.q, call.mask, grid.query_group, grid.num_groups
        wide = q.to(call.compute_dtype)
        valid = mask.valid_queries(q.shape[2])
        if group == 1 or (mask.sequential and valid is None):
            return wide[:, :, ::group]
        if valid is None:
            valid = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
        if mask.sequential:
            rows = first_valid(valid, groups, group)[:, None, :, None]
            return wide.take_along_dim(rows, 2)
        # Not a product with zero: padding may hold NaN.
        wide = wide.masked_fill(~valid[:, None, :, None], 0.0)
        return block_mean(in_blocks(wide, groups, group), valid_in_blocks(valid, groups, group))


def _seen_blocks(call: Call, grid: Grid) -> Tensor | None:
    """Bool `(batch, blocks)`: False for blocks of padding alone; None without padding."""
    if call.mask.key_valid is None:
        return None
    return valid_in_blocks(call.mask.key_valid, grid.num_blocks, grid.block_size).any(-1)
