"""Dense attention for layers or steps in which a block-selecting variant chooses nothing."""

from __future__ import annotations

from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.grid import Selection
from astbench_registry.interface import AttentionOutput, AttentionStats
from astbench_registry.toolbox.dense import attend_to_all


def attend_densely(call: Call, selection: Selection, *, tiled: bool = False) -> AttentionOutput:
    """Everything visible by torch's fused kernels; the list of all blocks only where statistics are wanted.

    Args:
        call: Padding may hold anything.
        selection: The blocks to report.
        tiled: Other layers report tiles: this one all of them.
    """
    q, k, mask = call.q, call.k, call.mask
    out = attend_to_all(q, k, call.v, mask, scale=call.scale)
    if not call.context.collect_stats:
        return AttentionOutput(out)
    layout = selection.layout(selection.visible.expand(q.shape[0], -1, -1, -1), call)
    visible = mask.visible_pairs(q, k)
    attended = visible[:, None].expand(-1, q.shape[1])
    tiles = attended if tiled else None
    return AttentionOutput(out, stats=AttentionStats(attended, visible, f"sdpa-{q.device.type}", layout, tiles=tiles))
