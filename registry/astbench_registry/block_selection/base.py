"""Attention over chosen key blocks: score, choose, attend. What its variants have in common.

A variant fills in :meth:`BlockSelectingAttention.scores`; or, where the score is a dot product of something of the
query group with something of the block, it derives from :class:`FactoredBlockSelection` instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from astbench_kernels import BlockLayout, merge_attention
from astbench_kernels.arguments import without_autocast
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.coarse_keys import CoarseAttention
from astbench_registry.block_selection.grid import Selection
from astbench_registry.block_selection.lists import computed_tiles, lists_of
from astbench_registry.block_selection.selector import BlockSelector
from astbench_registry.block_selection.summaries import BlockSummaries
from astbench_registry.configs.block_selection import BlockSelectionConfig
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    AttentionStats,
    ExplicitWeights,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.explicit import listed_rows, softmax_rows


class SelectorLosses(NamedTuple):
    """What a choice is learned by.

    Attributes:
        bias: `(batch, num_heads, groups, width)`, the kernel's `block_bias`, through which the task's gradient comes.
        losses: Auxiliary losses by name, weighted.
        log_prob: As in :class:`AttentionOutput`.
    """

    bias: Tensor | None = None
    losses: Mapping[str, Tensor] = MappingProxyType({})
    log_prob: Tensor | None = None


class Choice(NamedTuple):
    """What a call attends to, and what that is learned by.

    Attributes:
        layout: The kept blocks.
        learned_by: Bias, losses and log-probability.
        rest: Output `(batch, num_heads, query_length, value_dim)` and log-sum-exp `(batch, num_heads, query_length)` of
            one token that stands for all that was not kept; None without.
    """

    layout: BlockLayout
    learned_by: SelectorLosses = SelectorLosses()
    rest: tuple[Tensor, Tensor] | None = None


class BlockSelectingAttention(Attention):
    """Scores key blocks per query group, keeps the best within a budget, attends to nothing else.

    Under a sequential mask (causal self-attention, or cross-attention from a decoder) a group's first token
    (the first that is no padding) speaks for it, and only completed blocks, all of whose keys precede the
    group, compete; the blocks that the group itself stands in are always kept and masked per token. So no
    choice depends on later tokens (in groups of several only on how many of its own group there are). Pooling a causal
    group's queries would leak them. Without such a mask the group's mean query speaks.

    With `lists="carried"` every token chooses, and what one chose all later tokens of its tile see too
    (:mod:`astbench_registry.block_selection.carried`).
    """

    config: BlockSelectionConfig
    block_sparse = True
    selector_class: ClassVar[type[BlockSelector]] = BlockSelector

    def __init__(self, config: BlockSelectionConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.selector = self.selector_class(config)

    @abstractmethod
    def scores(self, call: Call, selection: Selection) -> Tensor:
        """Score every block for every group: `(batch, num_heads, groups, blocks)`, float32 or float64.

        Scores of blocks that are no candidates are never looked at, but must be finite.

        Args:
            call: Zeros where there is padding.
            selection: What there is a choice among.
        """
        raise NotImplementedError

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
        call = Call.of(self.shape, q, k, v, mask, scale, context)
        backend = call.backend(self.config.backend)
        with without_autocast(q.device.type):
            call = call.without_padding()
            choice = self.choice(call, backend)
            coarse = self.coarse(call, backend)
        learned_by = choice.learned_by
        out, lse = call.attend(choice.layout, backend, learned_by.bias)
        others = [] if coarse is None else [(coarse.out, coarse.lse)]
        if choice.rest is not None:
            others.append(choice.rest)
        if others:
            out, _ = merge_attention([(out, lse), *others])
        stats = self._stats(call, choice, coarse, backend) if call.context.collect_stats else None
        return AttentionOutput(out, learned_by.losses, stats, learned_by.log_prob)

    def explicit_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> ExplicitWeights:
        """See the base class: softmax over the keys of the chosen blocks."""
        call = Call.of(self.shape, q, k, v, mask, scale, context)
        backend = call.backend(self.config.backend)
        call = call.without_padding()
        choice = self.choice(call, backend)
        stats = self._stats(call, choice, None, backend) if call.context.collect_stats else None
        pattern = listed_rows(choice.layout, self.shape.num_heads)
        return ExplicitWeights(softmax_rows(q, k, mask, call.scale, pattern), stats)

    def choice(self, call: Call, backend: str) -> Choice:
        """Score, choose, and what the scores learn by; `backend` is the kernel that will attend."""
        selection = self.selection(call)
        scores = self.scores(call, selection)
        keep = self.choose(scores.detach(), call, selection)
        layout = self.layout(keep, call, selection)
        return Choice(layout, self.selector_losses(scores, keep, layout, call, selection))

    def selection(self, call: Call) -> Selection:
        """Groups, blocks and what each group may, must and need not see."""
        return self.selector.selection(call)

    def layout(self, keep: Tensor, call: Call, selection: Selection) -> BlockLayout:
        """The kept blocks as lists: of each group, or carried by tiles.

        Raises:
            ValueError: a step of decoding inside a tile, of whose rows before it nothing was kept.
        """
        return lists_of(keep, call, selection, self.selector.tile(call.mask))

    def new_cache_state(self) -> BlockSummaries:
        """See the base class: features of blocks, and the running list of the last tile."""
        return BlockSummaries()

    def choose(self, scores: Tensor, call: Call, selection: Selection) -> Tensor:
        """Bool `(batch, num_heads, groups, blocks)`: the blocks to keep; `scores` come without gradient."""
        return self.selector.choose(scores, selection, self.density_at(call.context.step))

    def density_at(self, step: int) -> float:
        """Density to keep after `step` optimizer steps."""
        return self.config.density

    def selector_losses(
        self, scores: Tensor, keep: Tensor, layout: BlockLayout, call: Call, selection: Selection
    ) -> SelectorLosses:
        """What the scores learn by, for variants that learn to choose.

        Args:
            scores: `(batch, num_heads, groups, blocks)`, with gradient.
            keep: Bool, as `scores`.
            layout: The same as lists.
            call: Zeros where there is padding.
            selection: What there was a choice among.
        """
        return SelectorLosses()

    def coarse(self, call: Call, backend: str) -> CoarseAttention | None:
        """Attention to coarse tokens that joins the softmax, for variants that have them; None for nothing."""
        return None

    def _stats(self, call: Call, choice: Choice, coarse: CoarseAttention | None, backend: str) -> AttentionStats:
        mask = call.mask
        attended = choice.layout.attended_pairs(causal=mask.causal, key_valid=mask.key_valid)
        beside = None
        if coarse is not None:
            beside = coarse.layout.attended_pairs(causal=mask.causal, key_valid=coarse.key_valid)
            beside = beside.expand_as(attended)
        if choice.rest is not None:
            one_a_row = (choice.rest[1] > -torch.inf).sum(-1).to(attended.dtype)
            beside = one_a_row if beside is None else beside + one_a_row
        ran = call.ran(choice.layout, backend, choice.learned_by.bias)
        visible, tiles = mask.visible_pairs(call.q, call.k), None
        if self.selector.tile(mask) is not None:
            tiles = computed_tiles(choice.layout, visible, causal=mask.causal)
        return AttentionStats(attended, visible, ran, choice.layout, beside, tiles=tiles)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """The kept blocks' two matmuls (fixed budget), without the scores; variants add theirs.

        None for carried lists: how much their rows' choices have in common depends on the text.
        """
        if self.selector.tile(mask) is not None:
            return None
        kept = self.selector.kept_keys(query_length, key_length, mask, self.density_at(0))
        return 4 * batch * self.shape.num_heads * kept * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache: any block may be chosen later."""
        return self.kv_cache_size(key_length)
