"""Which kernel runs, and what each was measured to cost against dense attention."""

from astbench_kernels.dispatch.explained import Explanation, explain
from astbench_kernels.dispatch.measured import EFFICIENCIES, Efficiency
from astbench_kernels.dispatch.rules import (
    TABLE,
    TRITON_DTYPES,
    TRITON_MAX_HEAD_DIM,
    Shapes,
    keys_seen,
    named,
)

__all__ = [
    "EFFICIENCIES",
    "TABLE",
    "TRITON_DTYPES",
    "TRITON_MAX_HEAD_DIM",
    "Efficiency",
    "Explanation",
    "Shapes",
    "explain",
    "keys_seen",
    "named",
]
