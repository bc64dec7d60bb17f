"""Linear attention with elu + 1 features (Katharopoulos et al. 2020, arXiv 2006.16236, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.configs.linear import LinearConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.linear import linear_attention_flops, normalised_linear_attention


class LinearAttention(Attention):
    """phi(x) = elu(x) + 1 takes the place of the exponential.

        out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)    (j <= i when causal)

    The paper knows no scale: its features are of q and k as they are. Here q is multiplied by
    scale * sqrt(head_dim) first, which is 1 by default. The paper's causal form walks over single tokens;
    this one over chunks, with the same result. Decoding is given all keys and sums them anew: the result is
    the recurrent form's, its constant cost per token is not. A row whose weights sum to less than 1e-28 (queries and
    keys around -30 in every dimension) becomes zero.
    """

    config: LinearConfig

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
        """See the base class. Time O((N + M) head_dim^2) per head; sums in float32 at least."""
        factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5
        stats = self.all_pairs(q, k, mask, context)
        dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (x.to(compute) for x in (q, k, v))
            out = normalised_linear_attention(q * factor, k, v, mask, _features, q.shape[-1])
        return AttentionOutput(out.to(dtype), stats=stats)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """The sums over keys and what the queries read of them; causal: inside the chunks too."""
        lengths = (query_length, key_length)
        return batch * linear_attention_flops(self.shape, self.shape.head_dim, lengths, mask)

    def state_size(self, key_length: int) -> int:
        """Per key/value head the sums of phi(k) v^T and of phi(k), whatever the length."""
        return self.shape.num_kv_heads * self.shape.head_dim * (self.shape.head_dim + 1)


def _features(x: Tensor) -> tuple[Tensor, None]:
    """elu(x) + 1, written so that x < -17 does not round to 0 in float32."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp()), None
