"""Dense attention for layers or steps in which a block-selecting variant chooses nothing."""

from __future__ import annotations

from torch import Tensor

from astbench_registry.block_selection.grid import Selection
from astbench_registry.interface import AttentionContext, AttentionOutput, AttentionStats
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.dense import attend_to_all


def attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    selection: Selection,
    *,
    scale: float | None,
    context: AttentionContext,
) -> AttentionOutput:
    """Everything visible by torch's fused kernels; the list of all blocks only for those who listen.

    Arguments as :meth:`astbench_registry.interface.Attention.forward`, and the blocks to report.
    """
    out = attend_to_all(q, k, v, mask, scale=scale)
    if not context.listen:
        return AttentionOutput(out)
    layout = selection.layout(selection.visible.expand(q.shape[0], -1, -1, -1), q, k, mask)
    visible = mask.visible_pairs(q, k)
    attended = visible[:, None].expand(-1, q.shape[1])
    return AttentionOutput(out, stats=AttentionStats(attended, visible, f"sdpa-{q.device.type}", layout))
