"""What the variants that pick key blocks share, and what their authors need: the base classes and their parts."""

from astbench_registry.block_selection.base import BlockSelectingAttention, Choice, SelectorLosses
from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.factored import FactoredBlockSelection
from astbench_registry.block_selection.features import BlockFeatures
from astbench_registry.block_selection.grid import Grid, Selection
from astbench_registry.block_selection.scores import block_scores
from astbench_registry.block_selection.selector import BIDIRECTIONAL_GROUP, BlockSelector
from astbench_registry.block_selection.summaries import BlockSummaries

__all__ = [
    "BIDIRECTIONAL_GROUP",
    "BlockFeatures",
    "BlockSelectingAttention",
    "BlockSelector",
    "BlockSummaries",
    "Call",
    "Choice",
    "FactoredBlockSelection",
    "Grid",
    "Selection",
    "SelectorLosses",
    "block_scores",
]
