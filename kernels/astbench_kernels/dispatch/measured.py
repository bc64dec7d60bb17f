"""What the CPU kernels were measured to cost against dense attention, for :func:`astbench_kernels.dispatch.explain`.

Copied from the records that each entry names; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """A measured R = time of the kernel / (density x time of dense); 1 would be ideal.

    Attributes:
        device: Where; CPU figures are one thread's.
        dtype: Of the inputs.
        head_dim: Head size.
        block_size: Keys a block.
        query_group: Queries a list.
        causal: Whether under a causal mask.
        tokens: Queries, and keys.
        density: Share of the visible pairs that was computed.
        forward: R of a forward pass.
        training: R of forward and backward together.
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
    record: str


def _measured(
    block_size: int, query_group: int, causal: bool, record: str, rows: dict[tuple[int, float], tuple[float, float]]
) -> list[Efficiency]:
    return [
        Efficiency("cpu", "float32", 64, block_size, query_group, causal, tokens, density, forward, training, record)
        for (tokens, density), (forward, training) in rows.items()
    ]


EFFICIENCIES = (
    *_measured(
        64,
        64,
        False,
        "results/kernel/bidirectional-cpu/record.json",
        {
            (1024, 0.125): (2.69, 1.48),
            (2048, 0.125): (1.41, 1.39),
            (4096, 0.125): (1.42, 1.41),
            (8192, 0.125): (1.64, 1.30),
            (16384, 0.125): (1.27, 1.31),
            (2048, 0.0625): (1.81, 1.48),
            (4096, 0.0625): (1.82, 1.37),
            (8192, 0.0625): (1.56, 1.36),
            (16384, 0.0625): (1.46, 1.55),
        },
    ),
    *_measured(
        64,
        256,
        False,
        "results/kernel/bidirectional-256-cpu/record.json",
        {(2048, 0.152): (1.49, 1.42), (8192, 0.125): (1.26, 1.29), (8192, 0.062): (1.90, 1.26)},
    ),
    *_measured(
        16,
        64,
        False,
        "results/kernel/bidirectional-blocks16-cpu/record.json",
        {
            (2048, 0.125): (1.85, 1.52),
            (4096, 0.125): (1.50, 1.41),
            (8192, 0.125): (1.36, 1.41),
            (16384, 0.125): (1.37, 1.42),
            (2048, 0.0625): (2.19, 1.96),
            (4096, 0.0625): (1.56, 1.50),
            (8192, 0.0625): (1.59, 1.40),
            (16384, 0.0625): (1.49, 1.49),
        },
    ),
    *_measured(
        64,
        1,
        True,
        "results/kernel/causal-cpu/record.json",
        {
            (1024, 0.180): (3.46, 2.37),
            (2048, 0.139): (4.82, 2.32),
            (4096, 0.129): (3.93, 2.28),
            (8192, 0.126): (2.52, 1.98),
            (16384, 0.125): (2.14, 1.74),
            (2048, 0.092): (3.94, 3.51),
            (4096, 0.070): (5.06, 3.11),
            (8192, 0.064): (3.48, 2.52),
            (16384, 0.063): (2.67, 1.99),
        },
    ),
    *_measured(
        16,
        1,
        True,
        "results/kernel/causal-blocks16-cpu/record.json",
        {
            (2048, 0.126): (8.43, 4.00),
            (4096, 0.125): (7.68, 4.76),
            (8192, 0.125): (4.70, 3.56),
            (16384, 0.125): (4.74, 4.61),
            (2048, 0.065): (13.18, 5.45),
            (4096, 0.063): (9.14, 5.73),
            (8192, 0.063): (6.09, 4.21),
            (16384, 0.063): (5.60, 4.19),
        },
    ),
    *_measured(
        4,
        1,
        True,
        "results/kernel/causal-blocks4-cpu/record.json",
        {
            (1024, 0.126): (12.26, 9.69),
            (2048, 0.125): (12.49, 9.57),
            (4096, 0.125): (12.46, 11.03),
            (8192, 0.125): (12.64, 10.87),
            (1024, 0.064): (22.59, 18.90),
            (2048, 0.063): (22.73, 18.55),
            (4096, 0.063): (22.07, 20.33),
            (8192, 0.063): (25.25, 15.51),
        },
    ),
)
"""The kernel alone on the lists that `ast` chose, 4 heads, one thread of an AMD EPYC (AVX-512; 256 rows AVX2)."""
