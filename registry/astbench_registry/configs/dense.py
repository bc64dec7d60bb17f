"""Options of dense attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities

Backend = Literal["auto", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "xformers", "flash_attn"]


@dataclass(frozen=True)
class DenseConfig(AttentionConfig):
    """Softmax attention over everything visible, by torch's scaled_dot_product_attention or the named kernel.

    Args:
        backend: auto (torch chooses), one of torch's kernels (sdpa_...), or a package; what it cannot serve is
            refused, nothing else is tried (`astbench doctor` says which can run here).
    """

    backend: Backend = "auto"

    capabilities: ClassVar = Capabilities(
        patterns=PATTERNS,
        any_value_size=True,
        decode=True,
        shift_invariant=True,
        exact_at_full_density=True,
        yields_probabilities=True,
    )
    paper: ClassVar = "Vaswani et al. 2017, arXiv 1706.03762"
    complexity: ClassVar = "N M"

    def __post_init__(self) -> None:
        self.require(self.backend in get_args(Backend), "backend", f"one of {', '.join(get_args(Backend))}")

    @property
    def can(self) -> Capabilities:
        """What the backend leaves of it; torch's flash kernel can do more on the CPU than on CUDA."""
        can = (
            self.capabilities
            if self.backend in ("auto", "sdpa_math")
            else replace(self.capabilities, any_value_size=False)
        )
        half, full = ("bfloat16", "float16"), ("float32", "bfloat16", "float16")
        if self.backend in ("sdpa_efficient", "xformers"):
            return replace(can, dtypes=full)
        if self.backend == "flash_attn":
            return replace(can, dtypes=half, padding=False)
        if self.backend == "sdpa_cudnn":
            return replace(can, dtypes=half)
        if self.backend == "sdpa_flash" and _cuda():
            return replace(can, dtypes=half, padding=False, decode=False)
        return can


def _cuda() -> bool:
    import torch  # only for the backend that depends on it: `astbench list` must not wait for torch

    return torch.cuda.is_available()
