"""From options and scores to kept blocks: which may be kept, which must be, how many are."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_kernels import select_blocks
from astbench_kernels.layout import ceil_div
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.grid import Grid, Selection
from astbench_registry.block_selection.pooling import valid_in_blocks
from astbench_registry.configs.block_selection import BlockSelectionConfig
from astbench_registry.mask import AttentionMask

BIDIRECTIONAL_GROUP = 64
"""Default queries per choice where a group may be pooled; under sequential masks it is 1."""


class BlockSelector:
    """The options of block selection at work. It knows nothing of how blocks are scored."""

    def __init__(self, config: BlockSelectionConfig) -> None:
        self.config = config

    def query_group(self, mask: AttentionMask) -> int:
        """Consecutive queries that share a choice under this mask."""
        return self.config.query_group or (1 if mask.sequential else BIDIRECTIONAL_GROUP)

    def tile(self, mask: AttentionMask) -> int | None:
        """Rows that share a carried list under this mask; None where each group has its own."""
        return self.config.query_tile if self.config.lists == "carried" and mask.causal else None

    def grid(self, call: Call) -> Grid:
        """Groups and blocks of a call.

        Raises:
            ValueError: decoding from inside a group whose first query is no longer there.
        """
        group, offset = self.query_group(call.mask), call.mask.query_offset
        if offset % group:
            raise ValueError(
                f"decoding from position {offset} needs the first query of its group of {group}, "
                "which is no longer there; set --attention.query_group=1 to decode"
            )
        groups = ceil_div(call.q.shape[2], group)
        return Grid(
            block_size=self.config.block_size,
            query_group=group,
            num_blocks=ceil_div(call.k.shape[2], self.config.block_size),
            num_groups=groups,
            first=torch.arange(groups, device=call.q.device) * group + offset,
        )

    def selection(self, call: Call) -> Selection:
        """Groups, blocks and what each group may, must and need not see."""
        config, mask, grid = self.config, call.mask, self.grid(call)
        if mask.causal and mask.key_valid is None and call.q.shape[2] == 1:
            return self._of_one_row(grid, mask.query_offset)
        size, blocks, first = grid.block_size, grid.num_blocks, grid.first
        last = (first + grid.query_group - 1).clamp(max=mask.query_offset + call.q.shape[2] - 1)
        start = torch.arange(blocks, device=call.q.device) * size
        stop = start + size
        visible = torch.ones(grid.num_groups, blocks, dtype=torch.bool, device=call.q.device)
        complete, always_kept = visible, torch.zeros_like(visible)
        if mask.causal:
            visible = start <= last[:, None]
            complete = stop <= first[:, None]
        if not mask.cross:
            reach = config.local_blocks * size
            always_kept = (start <= last[:, None] + reach) & (stop > first[:, None] - reach)
        if config.sink_block:
            always_kept = always_kept | (start == 0)
        visible = visible[None, None]
        if mask.key_valid is not None:
            seen = valid_in_blocks(mask.key_valid, blocks, size).any(-1)
            visible = visible & seen[:, None, None, :]
        return Selection(
            **vars(grid),
            visible=visible,
            always_kept=always_kept & visible,
            candidates=complete & visible,
        )

    def _of_one_row(self, grid: Grid, position: int) -> Selection:
        """The same for a step of decoding without padding, in a few operations."""
        size, blocks = grid.block_size, grid.num_blocks
        visible = torch.ones(1, 1, 1, blocks, dtype=torch.bool, device=grid.first.device)
        visible[..., position // size + 1 :] = False
        candidates, always_kept = visible.clone(), torch.zeros_like(visible)
        candidates[..., position // size :] = False
        nearest = max(0, position // size - self.config.local_blocks)
        always_kept[..., nearest : position // size + 1] = True
        if self.config.sink_block:
            always_kept[..., :1] = True
        return Selection(**vars(grid), visible=visible, always_kept=always_kept, candidates=candidates)

    def budget(self, visible_blocks: Tensor, density: float | None = None) -> Tensor:
        """int64, as `visible_blocks`: how many blocks a row with that many visible ones keeps.

        Args:
            visible_blocks: int64, any shape.
            density: In place of the option, for variants with a schedule.
        """
        config = self.config
        if config.top_k is not None:
            wanted = torch.full_like(visible_blocks, config.top_k)
        else:
            # The small term keeps 0.25 * 8 at 2, whatever floating point makes of it.
            wanted = torch.ceil(visible_blocks * (config.density if density is None else density) - 1e-6).long()
        return torch.minimum(wanted.clamp(min=config.min_blocks), visible_blocks)

    def choose(self, scores: Tensor, selection: Selection, density: float | None = None) -> Tensor:
        """Bool, as `scores`: the best candidates of each row within the budget, and what is always kept.

        Args:
            scores: `(batch, heads, groups, blocks)`, finite.
            selection: Groups, blocks, candidates.
            density: As in :meth:`budget`.
        """
        return self.best(scores, selection, self.budget(selection.visible.sum(-1), density))

    def best(self, scores: Tensor, selection: Selection, budget: Tensor) -> Tensor:
        """Bool, as `scores`: `budget` candidates of each row, those that are always kept counted in."""
        return select_blocks(scores, always_kept=selection.always_kept, candidates=selection.candidates, budget=budget)

    def keeps_all(self, selection: Selection, density: float | None = None) -> bool:
        """Whether the budget is enough for all that each row may keep: then scores decide nothing."""
        visible = selection.visible.sum(-1)
        return bool((self.budget(visible, density) >= visible).all())

    def kept_keys(self, query_length: int, key_length: int, mask: AttentionMask, density: float | None = None) -> int:
        """Keys gathered over all rows of one head under the fixed budget."""
        group, size = self.query_group(mask), self.config.block_size
        first = torch.arange(ceil_div(query_length, group)) * group + mask.query_offset
        blocks = torch.full_like(first, ceil_div(key_length, size))
        if mask.causal:
            last = (first + group).clamp(max=mask.query_offset + query_length)
            blocks = -(-last // size)
        return int(self.budget(blocks, density).sum()) * group * size
