"""Selective Self-Attention (Zhang et al. 2024, arXiv 2411.12892, section 3): learned temperatures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from astbench_registry.configs.ssa import SSAConfig
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

ALPHA = -2.0
"""Where alpha starts; sigmoid(-2) = 0.12 leaves most of the range above and still has a slope."""


class SelectiveAttention(Attention):
    """Dense attention, softmax((tau_q Q) K^T / sqrt(d)) (tau_v V), with inverse temperatures per token and head.

        tau_q(x, n) = tanh(f_q(x)) + 1 + sigma(alpha) log n,   tau_v(x) = tanh(f_v(x)) + 1,
        f_q(x) = w_q . gelu(W_q x),   f_v(x) = w_v . gelu(W_v x),   n = keys that the query sees.

    f is the paper's weight-sharing form, which reads the projections that are there and adds one vector; the other
    form, a network of its own on x, is not here. New parameters: w_q per query head, w_v per key/value head,
    alpha per layer.

    Differences from the paper:

    * sigma(alpha) - sigma(-2) stands for sigma(alpha), with alpha = -2 and w = 0 at the start, so that an
      untrained module is dense attention, bit for bit. The coefficient may so fall to -0.12. The published code
      has exp(-exp(beta)) there, 6e-4 at its start.
    * n is the query's position in the paper's causal models; without a causal mask all queries see n = N.
      Padding does not count.
    * In half precision tau_q Q and tau_v V are rounded to it before the dense kernel, as rotated queries are too:
      with logits of a hundred and more that shows.
    * The backbone hands q over with its rotary encoding, if it has one, and f_q then reads the rotated vector.
      v is never rotated, so f_v is the paper's, and decoding, which knows the past by its k and v, holds.

    Not checked against the paper's own code, which publishes the position-aware part alone: the gelu within f,
    that heads have vectors of their own (the paper writes a single head), and that values, of which the mask
    does not say how many queries see them, get no position-aware part.
    """

    config: SSAConfig

    def __init__(self, config: SSAConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.w_q = nn.Parameter(torch.zeros(shape.num_heads, shape.head_dim)) if config.token else None
        self.w_v = nn.Parameter(torch.zeros(shape.num_kv_heads, shape.head_dim)) if config.value else None
        self.alpha = nn.Parameter(torch.tensor(ALPHA)) if config.position else None

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
        """See the base class. Time O(N M), memory as dense attention."""
        stats = self.all_pairs(q, k, mask, context, f"sdpa-{q.device.type}")
        query, key, value = self._tempered(q, k, v, mask)
        return AttentionOutput(attend_to_all(query, key, value, mask, scale=scale), stats=stats)

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
        """See the base class: of tempered queries, for tempered values."""
        query, key, value = self._tempered(q, k, v, mask)
        stats = self.all_pairs(q, k, mask, context)
        return ExplicitWeights(softmax_rows(query, key, mask, scale), stats, value)

    def _tempered(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and values times their inverse temperatures, and the keys; zeros where there is padding."""
        q, k, v = mask.without_padding(q, k, v)
        value = _scaled(v, None if self.w_v is None else 1 + _token_aware(v, self.w_v))
        return _scaled(q, self.query_temperature(q, k, mask)), k, value

    def query_temperature(self, q: Tensor, k: Tensor, mask: AttentionMask) -> Tensor | None:
        """Inverse temperatures, broadcastable to `(batch, num_heads, query_length)`, float32 or more."""
        tau = None if self.w_q is None else 1 + _token_aware(q, self.w_q)
        if self.alpha is None:
            return tau
        wide = torch.promote_types(q.dtype, torch.float32)
        alpha = self.alpha.to(wide)
        coefficient = alpha.sigmoid() - torch.full_like(alpha, ALPHA).sigmoid()
        seen = visible_keys(q.shape[2], k.shape[2], mask, q.device)[:, None]
        return (1 if tau is None else tau) + coefficient * seen.clamp(min=1).to(wide).log()

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls of N x M x D per head, as dense attention; temperatures are no matmuls."""
        return 4 * batch * self.shape.num_heads * query_length * key_length * self.shape.head_dim

    def state_size(self, key_length: int) -> int:
        """The KV cache."""
        return self.kv_cache_size(key_length)


def visible_keys(query_length: int, key_length: int, mask: AttentionMask, device: torch.device) -> Tensor:
    """int64 `(batch or 1, query_length or 1)`: how many keys each query sees."""
    valid = mask.key_valid
    if valid is None:
        valid = torch.ones(1, key_length, dtype=torch.bool, device=device)
    if not mask.causal:
        return valid.sum(1, keepdim=True)
    return valid.cumsum(1)[:, mask.query_offset : mask.query_offset + query_length]


def _token_aware(x: Tensor, w: Tensor) -> Tensor:
    """tanh(w . gelu(x)): `(batch, heads, length, d)` and `(heads, d)` to `(batch, heads, length)`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (gelu(x.to(wide)) * w.to(wide)[:, None]).sum(-1).tanh()


def _scaled(x: Tensor, tau: Tensor | None) -> Tensor:
    return x if tau is None else (x * tau.unsqueeze(-1)).to(x.dtype)
