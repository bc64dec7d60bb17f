"""Longformer's window by the matrix products of transformers' own layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from astbench_kernels.layout import ceil_div


def load_layer() -> Any:
    """The `LongformerSelfAttention` of transformers without its linear layers; only its window products are used.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    # The products take their sizes from their arguments, so that any will do here.
    layer = LongformerSelfAttention(
        LongformerConfig(hidden_size=1, num_attention_heads=1, attention_window=[2]), layer_id=0
    )
    for name in list(dict(layer.named_children())):
        setattr(layer, name, nn.Identity())
    return layer


def window_rows(
    layer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ordinary: Tensor,
    listed: Tensor,
    real: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Every row over its window, both sides, and the global keys; and how many keys each row saw.

    Args:
        layer: From :func:`load_layer`.
        q: `(batch, heads, length, head_dim)`, and so `k` and `v`, which hold zeros for padding.
        k: Keys.
        v: Values.
        ordinary: Bool `(batch, length)`: keys that are neither padding nor global.
        listed: int64 `(batch, globals)`: positions of the global keys.
        real: Bool, as `listed`: False for filling.
        window: Keys on each side.
        scale: Factor on q . k.

    Returns:
        `(batch, heads, length, head_dim)`, and int64 `(batch, length)`. Rows that see nothing are zero.
    """
    length = q.shape[2]
    window = fitting(window, length)
    tail = missing(length, window)
    wide = torch.promote_types(q.dtype, torch.float32)  # half precision would round logits and weights
    query, key, value = (
        pad(x.transpose(1, 2), (0, 0, 0, 0, 0, tail)) for x in (q.to(wide) * scale, k.to(wide), v.to(wide))
    )
    near = layer._sliding_chunks_query_key_matmul(query, key, window)[
        :, :length
    ]  # (batch, length, heads, 2 window + 1)
    position = torch.arange(length, device=q.device)[:, None] + torch.arange(-window, window + 1, device=q.device)
    seen = ordinary[:, position.clamp(0, length - 1)] & (position >= 0) & (position < length)
    far = torch.einsum("bihd,bghd->bihg", query[:, :length], _at(key, listed))
    allowed = torch.cat([real[:, None, :].expand(-1, length, -1), seen], -1)  # (batch, length, globals + 2 window + 1)
    number = allowed.sum(-1)
    logits = torch.cat([far, near], -1).masked_fill(~allowed[:, :, None], -torch.inf)
    logits = logits.masked_fill((number == 0)[:, :, None, None], 0.0)
    weights = logits.softmax(-1)
    weights = weights.masked_fill(~allowed[:, :, None], 0.0)
    to_far, to_near = weights.split([listed.shape[1], 2 * window + 1], -1)
    out = layer._sliding_chunks_matmul_attn_probs_value(pad(to_near, (0, 0, 0, 0, 0, tail)), value, window)
    out = out[:, :length] + torch.einsum("bihg,bghd->bihd", to_far, _at(value, listed))
    return out.transpose(1, 2).to(q.dtype), number


def fitting(window: int, length: int) -> int:
    """No wider than the sequence, but 2 at least: with 1 their product fails on a shape."""
    return min(window, max(length, 2))


def missing(length: int, window: int) -> int:
    """Rows to add: the products want multiples of twice the window."""
    return ceil_div(length, 2 * window) * 2 * window - length


def computed_pairs(length: int, window: int, known: int) -> int:
    """(query, key) pairs per head that the two products compute on average, with `known` global keys.

    The first multiplies overlapping squares of twice the window, the second chunks of `window` rows and 3 windows.
    """
    window = fitting(window, length)
    chunks = (length + missing(length, window)) // window  # an even number
    return ((chunks - 1) * (2 * window) ** 2 + chunks * 3 * window**2) // 2 + length * known


def _at(x: Tensor, listed: Tensor) -> Tensor:
    """`(batch, length, heads, d)` at positions `(batch, n)`."""
    return x.take_along_dim(listed[:, :, None, None], 1)
