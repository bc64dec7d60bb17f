"""Linformer (Wang et al. 2020, arXiv 2006.04768): attention to `k` learned mixtures of the keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from astbench_registry.configs.linformer import LinformerConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.positions import longest_input, require_length


class LinformerAttention(Attention):
    """Eq. 7: softmax(Q (E^T K)^T / sqrt(d)) F^T V, with E and F of shape (positions, k).

    Shorter sequences use the first rows of E and F, and padding is mixed in with zeros, so that only real tokens
    count; a token's row is its position in the padded sequence. All `k` mixtures are attended to, whatever the
    length. Every query reaches every key, so that the density reported is 1.

    Differs from the paper: with grouped heads, sharing "none" has one E and one F for each key/value head.
    Sharing across layers, projections of another kind (pooling, convolution) and a `k` per layer are left out.
    E and F start uniform within 1/sqrt(k) as in the `linformer` package; the paper gives no start for training.

    Each mixture holds all keys, later ones too: there is no causal self-attention. Under a causal cross pattern
    every query row stands alone; each decoding step projects the whole source anew.
    """

    config: LinformerConfig

    def __init__(self, config: LinformerConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.longest = longest_input("linformer", config.max_length, shape)
        heads = shape.num_kv_heads if config.sharing == "none" else 1
        self.E = nn.Parameter(self._start(heads))
        if config.sharing != "key_value":
            self.F = nn.Parameter(self._start(heads))

    def _start(self, heads: int) -> Tensor:
        return torch.empty(heads, self.longest, self.config.k).uniform_(-1, 1) * self.config.k**-0.5

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
        """See the base class. Time and memory O((N + M) k)."""
        require_length("linformer", k.shape[2], self.longest)
        q, k, v = mask.without_padding(q, k, v)
        values = self.E if self.config.sharing == "key_value" else self.F
        wide = torch.promote_types(
            q.dtype, torch.float32
        )  # mixtures of many keys are large, and rounding them moves logits
        with torch.autocast(q.device.type, enabled=False):
            key, value = _project(self.E, k.to(wide)), _project(values, v.to(wide))
            out = scaled_dot_product_attention(
                q.to(wide), key, value, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            ).to(q.dtype)
        return AttentionOutput(out, stats=self.all_pairs(q, k, mask, context, f"sdpa-{q.device.type}"))

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two projections of the keys' length, and two matmuls over `k` rows."""
        projections = 4 * batch * self.shape.num_kv_heads * key_length * self.config.k * self.shape.head_dim
        return projections + 4 * batch * self.shape.num_heads * query_length * self.config.k * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The projected keys and values of the source, whatever its length."""
        return self.kv_cache_size(self.config.k)


def _project(matrix: Tensor, x: Tensor) -> Tensor:
    """`(heads or 1, positions, k)` and `(batch, heads, length, d)` to `(batch, heads, k, d)`."""
    return torch.einsum("hnk,bhnd->bhkd", matrix[:, : x.shape[2]].to(x.dtype), x)
