"""Dense softmax attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) by torch's own kernels or a package's."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_kernels import check_dense_backend
from astbench_registry.configs.dense import DenseConfig
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    ExplicitWeights,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.dense import attend_to_all
from astbench_registry.toolbox.explicit import softmax_rows


class DenseAttention(Attention):
    """softmax(Q K^T / sqrt(d)) V over everything visible; the baseline of every comparison."""

    config: DenseConfig

    def __init__(self, config: DenseConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        try:
            check_dense_backend(config.backend, "cuda" if torch.cuda.is_available() else "cpu")
        except ValueError as error:
            raise ValueError(f"attention 'dense' with --attention.backend={config.backend}: {error}") from error

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """See the base class. Time O(N M); memory O(N), but O(N M) when both padded and causal."""
        try:
            out = attend_to_all(q, k, v, mask, scale=scale, backend=self.config.backend)
        except ValueError as error:
            raise ValueError(f"attention 'dense' with --attention.backend={self.config.backend}: {error}") from error
        ran = "sdpa" if self.config.backend == "auto" else self.config.backend
        return AttentionOutput(out, stats=self.all_pairs(q, k, mask, context, f"{ran}-{q.device.type}"))

    def explicit_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> ExplicitWeights:
        """See the base class."""
        return ExplicitWeights(softmax_rows(q, k, mask, scale), self.all_pairs(q, k, mask, context))

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls of N x M x D per head, masked pairs included: what the FLOP counter sees."""
        return 4 * batch * self.shape.num_heads * query_length * key_length * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache."""
        return self.kv_cache_size(key_length)
