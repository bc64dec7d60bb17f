"""Every built-in attention: what it can do and what one layer of it costs, counted on the spot."""

from __future__ import annotations

from functools import cache

from astbench.tables.layout import Row, Table
from astbench_registry import registered
from astbench_registry.capabilities import Capabilities, Pattern

LENGTH, HEADS, HEAD_DIM = 2048, 8, 64
"""The layer whose work is counted."""

HEAD = (
    "attention",
    "paper",
    "patterns",
    "decodes",
    "time",
    "GFLOPs",
    "parameters of its own",
    "numbers kept for decoding",
)


@cache
def table() -> Table:
    """A row for every attention of the registry that is built in; takes seconds, and torch."""
    rows = []
    for name, row in registered().items():
        if row.source != "astbench" or row.config is None:
            continue
        can = row.config().can
        parameters, operations, state = counted(name, can.patterns[0])
        line = (
            f"`{name}`",
            row.config.paper,
            _patterns(can),
            "yes" if can.decode else "-",
            row.config.complexity,
            f"{operations / 1e9:.2f}",
            f"{parameters:,}",
            f"{state:,}" if state is not None else "-",
        )
        rows.append(Row(line))
    return Table("attentions", "The attentions", HEAD, 5, tuple(rows))


def _patterns(can: Capabilities) -> str:
    strictly = "causal" if can.strictly_causal else "causal (not strictly)"
    marks = {"bidirectional_self": "bidirectional", "causal_self": strictly, "bidirectional_cross": "cross"}
    return ", ".join(mark for pattern, mark in marks.items() if pattern in can.patterns)


def counted(name: str, pattern: Pattern) -> tuple[int, int, int | None]:
    """Parameters, operations of one forward call by torch's counter, and numbers kept for decoding."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

    from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention

    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    shape = AttentionShape(HEADS, HEADS, HEAD_DIM, hidden_size=width, max_positions=LENGTH)
    module = build_attention(name, {}, shape).eval()
    q, k, v = (torch.randn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(3))
    context = AttentionContext(hidden_states=torch.randn(1, LENGTH, width))
    # The counter has a formula for torch's fused attention, but not under its name on CPUs.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        module(q, k, v, AttentionMask(pattern), context=context)
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops(), module.state_size(LENGTH)
