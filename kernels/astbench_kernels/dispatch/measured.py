"""What the CPU kernels were measured to cost against dense attention, for :func:`astbench_kernels.dispatch.explain`.

Copied from the records that each entry names; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """A measured R = time / (density x time of dense); 1 would be ideal.

    Attributes:
        device: Where; CPU figures are one thread's.
        dtype: Of the inputs.
        head_dim: Head size.
        block_size: Keys a block.
        query_group: Queries a list.
        causal: Whether under a causal mask.
        tokens: Queries, and keys.
        density: Share of the visible pairs that was computed.
        forward: R of the kernel's forward pass.
        training: R of the kernel's forward and backward together.
        layer_forward: R of the forward pass of all of an `ast` layer, choosing included.
        layer_training: R of its forward and backward together.
        record: Where it is from.
    """

    device: str
    dtype: str
    head_dim: int
    block_size: int
    query_group: int
    causal: bool
    tokens: int
    density: float
    forward: float
    training: float
    layer_forward: float
    layer_training: float
    record: str


def _measured(
    block_size: int,
    query_group: int,
    causal: bool,
    record: str,
    rows: dict[tuple[int, float], tuple[float, float, float, float]],
) -> list[Efficiency]:
    return [
        Efficiency("cpu", "float32", 64, block_size, query_group, causal, tokens, density, *figures, record)
        for (tokens, density), figures in rows.items()
    ]


EFFICIENCIES = (
    *_measured(
        64,
        64,
        False,
        "results/kernel/bidirectional-cpu/record.json",
        {
            (1024, 0.125): (2.69, 1.48, 2.53, 2.37),
            (2048, 0.125): (1.41, 1.39, 1.71, 2.00),
            (4096, 0.125): (1.42, 1.41, 1.57, 1.86),
            (8192, 0.125): (1.64, 1.30, 1.75, 1.81),
            (16384, 0.125): (1.27, 1.31, 1.34, 1.91),
            (2048, 0.0625): (1.81, 1.48, 2.76, 2.42),
            (4096, 0.0625): (1.82, 1.37, 1.82, 2.38),
            (8192, 0.0625): (1.56, 1.36, 1.72, 2.16),
            (16384, 0.0625): (1.46, 1.55, 1.54, 3.26),
        },
    ),
    *_measured(
        64,
        256,
        False,
        "results/kernel/bidirectional-256-cpu/record.json",
        {
            (2048, 0.152): (1.49, 1.42, 2.04, 2.09),
            (8192, 0.125): (1.26, 1.29, 1.48, 2.05),
            (8192, 0.062): (1.90, 1.26, 1.76, 2.49),
        },
    ),
    *_measured(
        16,
        64,
        False,
        "results/kernel/bidirectional-blocks16-cpu/record.json",
        {
            (2048, 0.125): (1.85, 1.52, 2.35, 2.27),
            (4096, 0.125): (1.50, 1.41, 1.87, 1.90),
            (8192, 0.125): (1.36, 1.41, 1.46, 1.96),
            (16384, 0.125): (1.37, 1.42, 1.45, 2.27),
            (2048, 0.0625): (2.19, 1.96, 3.50, 3.37),
            (4096, 0.0625): (1.56, 1.50, 1.94, 2.65),
            (8192, 0.0625): (1.59, 1.40, 1.77, 2.71),
            (16384, 0.0625): (1.49, 1.49, 1.63, 3.40),
        },
    ),
    *_measured(
        64,
        1,
        True,
        "results/kernel/causal-cpu/record.json",
        {
            (1024, 0.180): (3.46, 2.37, 5.81, 4.12),
            (2048, 0.139): (4.82, 2.32, 6.40, 3.90),
            (4096, 0.129): (3.93, 2.28, 6.04, 4.33),
            (8192, 0.126): (2.52, 1.98, 4.07, 3.31),
            (16384, 0.125): (2.14, 1.74, 3.94, 3.61),
            (2048, 0.092): (3.94, 3.51, 6.23, 5.57),
            (4096, 0.070): (5.06, 3.11, 8.56, 6.39),
            (8192, 0.064): (3.48, 2.52, 6.52, 5.36),
            (16384, 0.063): (2.67, 1.99, 6.00, 5.21),
        },
    ),
    *_measured(
        16,
        1,
        True,
        "results/kernel/causal-blocks16-cpu/record.json",
        {
            (2048, 0.126): (8.43, 4.00, 12.20, 9.47),
            (4096, 0.125): (7.68, 4.76, 11.63, 8.75),
            (8192, 0.125): (4.70, 3.56, 9.31, 8.22),
            (16384, 0.125): (4.74, 4.61, 10.44, 9.07),
            (2048, 0.065): (13.18, 5.45, 16.11, 11.99),
            (4096, 0.063): (9.14, 5.73, 19.09, 13.68),
            (8192, 0.063): (6.09, 4.21, 15.32, 13.13),
            (16384, 0.063): (5.60, 4.19, 15.61, 13.33),
        },
    ),
    *_measured(
        4,
        1,
        True,
        "results/kernel/causal-blocks4-cpu/record.json",
        {
            (1024, 0.126): (12.26, 9.69, 26.37, 23.23),
            (2048, 0.125): (12.49, 9.57, 28.49, 26.88),
            (4096, 0.125): (12.46, 11.03, 31.14, 37.14),
            (8192, 0.125): (12.64, 10.87, 35.34, 40.62),
            (1024, 0.064): (22.59, 18.90, 47.20, 44.82),
            (2048, 0.063): (22.73, 18.55, 52.21, 57.06),
            (4096, 0.063): (22.07, 20.33, 60.69, 71.00),
            (8192, 0.063): (25.25, 15.51, 65.22, 74.07),
        },
    ),
)
"""On the lists that `ast` chose, 4 heads, one thread of an AMD EPYC (AVX-512; 256 rows AVX2)."""
