"""Options of Nyströmformer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from astbench_registry.capabilities import AttentionConfig, Capabilities


@dataclass(frozen=True)
class NystromConfig(AttentionConfig):
    """Nyströmformer: softmax attention through `num_landmarks` segment means and a pseudo-inverse.

    Args:
        num_landmarks: Segments whose mean queries and keys stand for the sequence; a sequence with no more
            tokens than that gets dense attention.
        pinv_iterations: Iterations of the pseudo-inverse (the paper's 6).
        conv_kernel_size: Tokens under the depthwise convolution of the values that is added to the output, an
            odd number; 0 = none. The `nystrom_attention` package takes 33.
    """

    num_landmarks: int = 64
    pinv_iterations: int = 6
    conv_kernel_size: int = 0

    capabilities: ClassVar = Capabilities(
        patterns=("bidirectional_self",), any_value_size=True, exact_at_full_density=True
    )
    paper: ClassVar = "Xiong et al. 2021, arXiv 2102.03902, eq. 13-15"
    complexity: ClassVar = "N num_landmarks + num_landmarks^3 pinv_iterations"
    conformance_options: ClassVar = {"num_landmarks": 7}
    full_density_options: ClassVar = {"num_landmarks": 2**20, "conv_kernel_size": 0}

    def __post_init__(self) -> None:
        self.require(self.num_landmarks >= 1, "num_landmarks", "at least 1")
        self.require(self.pinv_iterations >= 1, "pinv_iterations", "at least 1")
        odd = self.conv_kernel_size == 0 or (self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 1)
        self.require(odd, "conv_kernel_size", "0 or an odd number of tokens")

    @property
    def can(self) -> Capabilities:
        """With the convolution it owns parameters."""
        return replace(self.capabilities, owns_parameters=self.conv_kernel_size > 0)
