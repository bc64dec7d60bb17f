"""A picture of what was attended to: one panel a layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from astbench_kernels import BlockLayout
from astbench_registry.interface import AttentionStats

PANELS = 8
"""Layers drawn at most; of more, evenly spaced ones."""


def draw_pattern(
    file: Path,
    stats: list[tuple[str, AttentionStats]],
    name: str,
    lengths: Mapping[str, tuple[int, int]] | None = None,
    causal: Collection[str] = (),
) -> str | None:
    """Draw the kept blocks of the first sequence, mean over heads, query groups down and key blocks across.

    Args:
        file: PNG to write.
        stats: Layer path and statistics.
        name: The attention's name.
        lengths: By path, the real queries and keys of the first sequence; what lies behind is padding and is not
            drawn.
        causal: Paths of layers under a causal mask. What all rows of a group may not see is grey.

    Returns:
        The file's name, or None for an attention that does not choose blocks.
    """
    chosen = [(path, s) for path, s in stats if s.layout is not None]
    if not chosen:
        return None
    # The object-oriented interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    step = -(-len(chosen) // PANELS)
    layers = len(chosen)
    chosen = chosen[::step]
    figure = Figure(figsize=(3.2 * len(chosen) + 0.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    image = None
    for number, (path, s) in enumerate(chosen):
        assert s.layout is not None
        axes = figure.add_subplot(1, len(chosen), number + 1)
        share = s.layout.to_mask()[0].float().mean(0)
        if path in causal:
            share = share.masked_fill(_future(s.layout), torch.nan)
        if lengths is not None:
            queries, keys = lengths[path]
            share = share[: -(-queries // s.layout.query_group), : -(-keys // s.layout.block_size)]
        image = axes.imshow(share.cpu().numpy(), vmin=0, vmax=1, cmap="magma_r", aspect="auto", interpolation="nearest")
        axes.set_facecolor("0.8")  # shows where there is no share
        axes.set_title(f"{layer_name(path)}, density {float(s.density.mean()):.2f}", fontsize=9)
        axes.set_xlabel(f"key blocks of {_tokens(s.layout.block_size)}", fontsize=8)
        if number == 0:
            axes.set_ylabel(f"query groups of {_tokens(s.layout.query_group)}", fontsize=8)
        axes.tick_params(labelsize=7)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="share of heads that keep the block", shrink=0.9)
    grey = "; grey: not visible" if any(path in causal for path, _ in chosen) else ""
    some = f", {len(chosen)} of {layers} layers" if step > 1 else ""
    figure.suptitle(f"{name}: blocks kept, first sequence of the evaluation{some}{grey}", fontsize=10)
    figure.savefig(file, dpi=110)
    return file.name


def _future(layout: BlockLayout) -> Tensor:
    """Bool `(groups, key_blocks)`: blocks whose first key comes after the group's last query."""
    device = layout.indices.device
    last = (layout.first_group + torch.arange(layout.num_groups, device=device) + 1) * layout.query_group - 1
    start = torch.arange(layout.num_blocks, device=device) * layout.block_size
    return start > last.clamp(max=layout.query_offset + layout.query_length - 1)[:, None]


def layer_name(path: str) -> str:
    """A layer as a picture calls it: `layer 3`, `decoder layer 0`, `cross layer 1`."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    if not numbers:
        return path
    stacks = {"encoder_attn": "cross", "encoder.": "encoder", "decoder.": "decoder"}
    stack = next((f"{name} " for mark, name in stacks.items() if mark in path), "")
    return f"{stack}layer {numbers[-1]}"


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"
