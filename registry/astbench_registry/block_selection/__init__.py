"""What the variants that pick key blocks share, and what their authors need: the base class and its parts."""

from astbench_registry.block_selection.base import BIDIRECTIONAL_GROUP, BlockSelectingAttention, Taught
from astbench_registry.block_selection.grid import Grid, Selection
from astbench_registry.block_selection.scores import block_scores
from astbench_registry.block_selection.summaries import BlockSummaries

__all__ = [
    "BIDIRECTIONAL_GROUP",
    "BlockSelectingAttention",
    "BlockSummaries",
    "Grid",
    "Selection",
    "Taught",
    "block_scores",
]
