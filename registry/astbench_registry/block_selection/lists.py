"""From what each group keeps to the lists that a kernel runs on, and what those lists come to in tiles."""

from __future__ import annotations

from torch import Tensor

from astbench_kernels import BlockLayout
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.carried import carried_layout
from astbench_registry.block_selection.grid import Selection
from astbench_registry.block_selection.summaries import BlockSummaries


def lists_of(keep: Tensor, call: Call, selection: Selection, tile: int | None) -> BlockLayout:
    """What each group keeps as lists: its own, or carried by tiles of `tile` rows.

    Args:
        keep: Bool `(batch, lists, groups, blocks)`.
        call: Whose cache state, where it is :class:`BlockSummaries`, holds the list of the last tile.
        selection: What there was a choice among.
        tile: From :meth:`BlockSelector.tile`.

    Raises:
        ValueError: a step of decoding inside a tile, of whose rows before it nothing was kept.
    """
    if tile is None:
        return selection.layout(keep, call)
    kept = call.context.summaries
    return carried_layout(keep, call, selection, tile, kept.running if isinstance(kept, BlockSummaries) else None)


def computed_tiles(layout: BlockLayout, visible: Tensor, *, causal: bool) -> Tensor:
    """For :attr:`AttentionStats.tiles`: `(batch, lists)`, the share of tiles times the visible pairs `(batch,)`."""
    listed, most = layout.tiles(causal=causal)
    return listed / max(1, most) * visible[:, None]
