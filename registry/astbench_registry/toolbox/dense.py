"""Softmax attention over everything visible: what dense attention is, and what others end with."""

from __future__ import annotations

from torch import Tensor

from astbench_kernels import dense_attention
from astbench_registry.mask import AttentionMask


def attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float | None, backend: str = "auto"
) -> Tensor:
    """As :func:`astbench_kernels.dense_attention`, under a mask of the interface; shapes as there.

    Cost: O(N M) time; memory O(N) in torch's fused kernels, but O(N M) when both padded and causal.
    """
    query_length, key_length = q.shape[2], k.shape[2]
    at_the_end = mask.query_offset + query_length == key_length
    plain = mask.key_valid is None and (not mask.causal or at_the_end)
    q, k, v = mask.without_padding(q, k, v)
    return dense_attention(
        q,
        k,
        v,
        allowed=None if plain else mask.dense(query_length, key_length, q.device),
        causal=plain and mask.causal,
        scale=scale,
        backend=backend,
    )
