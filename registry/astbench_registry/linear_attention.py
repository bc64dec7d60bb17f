"""Attention whose weights are products of features, phi(q) . phi(k), in time and memory linear in the lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.layout import ceil_div
from astbench_registry.interface import AttentionMask

CHUNK = 64
"""Causal rows handled together. Fastest or within 10% of it on one CPU core, forward and backward, of 32 to 512
rows, at 512, 2048 and 8192 tokens, 64 and 256 features, head_dim 64."""

LOWEST = -1e30
"""Log scale of a key that is not there: finite, so that differences of two of them are no NaN."""


def normalised_linear_attention(
    q_features: Tensor, k_features: Tensor, v: Tensor, mask: AttentionMask, k_log_scale: Tensor | None = None
) -> Tensor:
    """Average of the values with weights phi(q_i) . phi(k_j) over the visible keys.

        out_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = (phi(q_i) . phi(k_j)) exp(s_j)

    Everything is computed from sums over keys of phi(k_j) v_j^T. The true features of a key may be too large or
    too small for floating point, so they come as phi(k_j) and a logarithm s_j; every row is computed relative
    to the largest s_j *that it sees*, never to a later key's or another sequence's. Any positive factor on a
    row of `q_features` cancels, so the caller is free to divide by the row's maximum.

    Args:
        q_features: phi(q), not negative, `(batch, num_heads, query_length, num_features)`, float32 or float64.
        k_features: phi(k), not negative, `(batch, num_kv_heads, key_length, num_features)`.
        v: `(batch, num_kv_heads, key_length, head_dim)`, of the same dtype.
        mask: Pattern, offset and padding. Features and values of padded keys are set to zero here; NaN in
            them must be gone before, or it reaches the gradients of whatever computed them.
        k_log_scale: s, `(batch, num_kv_heads, key_length)`, treated as a constant; zero when None.

    Returns:
        `(batch, num_heads, query_length, head_dim)`. Zero where nothing is visible, and where the visible
        weights are too small to divide by (their sum is below 1e-28 in float32).

    Cost: O((N + M) num_features head_dim) time. Memory O((N + M) (num_features + head_dim)); causal: one state
        of num_features x head_dim and CHUNK x CHUNK weights per CHUNK rows and head beside it.
    """
    k_features, v = mask.without_padding(k_features, v)
    if k_log_scale is None:
        k_log_scale = k_features.new_zeros(k_features.shape[:3])
    k_log_scale = k_log_scale.detach()
    if mask.key_valid is not None:
        k_log_scale = k_log_scale.masked_fill(~mask.key_valid[:, None], LOWEST)
    values = pad(v, (0, 1), value=1.0)  # the last column adds up the weights
    q = q_features.unflatten(1, (k_features.shape[1], -1))  # (batch, kv_heads, group, queries, features)
    if mask.causal:
        sums = _causal_sums(q, k_features, values, k_log_scale, mask.query_offset)
    else:
        state = _state(k_features, values, k_log_scale, k_log_scale.amax(-1, keepdim=True))
        sums = (q.flatten(2, 3) @ state).unflatten(2, q.shape[2:4])
    sums = sums.flatten(1, 2)
    # Not the smallest number itself: the gradient divides by the sum once more.
    least = torch.finfo(sums.dtype).tiny ** 0.75
    total = sums[..., -1:]
    return (sums[..., :-1] / total.clamp(min=least)).masked_fill(total < least, 0.0)


def _state(k: Tensor, values: Tensor, log_scale: Tensor, reference: Tensor) -> Tensor:
    """`(..., features, head_dim + 1)`: the sum over keys of exp(s - reference) phi(k) [v, 1]^T."""
    return (k * (log_scale - reference).exp().unsqueeze(-1)).transpose(-1, -2) @ values


def _causal_sums(q: Tensor, k: Tensor, values: Tensor, log_scale: Tensor, offset: int) -> Tensor:
    """Prefix sums by chunks: row i adds the state of all earlier chunks to its own chunk's keys up to itself.

    Query row i stands at position offset + i; keys after the last query's position are left out. Returns
    `(batch, kv_heads, group, queries, head_dim + 1)`, row i relative to exp(largest s up to its position).
    """
    group, length = q.shape[2:4]
    chunk, chunks = _chunks(length)
    end = offset + chunk * chunks
    missing = end - k.shape[2]  # of the last chunk; negative when there are later keys, which this cuts off
    k, values = (pad(x, (0, 0, 0, missing)) for x in (k, values))
    log_scale = pad(log_scale, (0, missing), value=LOWEST)
    largest = log_scale.cummax(-1).values

    own_k, own_values = (x[:, :, offset:].unflatten(2, (chunks, chunk)) for x in (k, values))
    own_scale, own_largest = (x[:, :, offset:].unflatten(2, (chunks, chunk)) for x in (log_scale, largest))
    rows = pad(q, (0, 0, 0, chunk * chunks - length)).unflatten(3, (chunks, chunk))
    rows = rows.transpose(2, 3).flatten(3, 4)  # (batch, kv_heads, chunks, group * chunk, features)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    relative = (own_scale.unsqueeze(-2) - own_largest.unsqueeze(-1)).masked_fill(later, -torch.inf).exp()
    weights = (rows @ own_k.transpose(-1, -2)).unflatten(3, (group, chunk)) * relative.unsqueeze(3)
    inside = weights.flatten(3, 4) @ own_values

    at_end = own_largest[..., -1]  # (batch, kv_heads, chunks)
    first = largest[:, :, offset - 1 : offset] if offset else torch.full_like(at_end[..., :1], LOWEST)
    at_start = torch.cat([first, at_end[..., :-1]], -1)
    past = _state(k[:, :, :offset], values[:, :, :offset], log_scale[:, :, :offset], first)
    added = _state(own_k[:, :, :-1], own_values[:, :, :-1], own_scale[:, :, :-1], at_end[:, :, :-1, None])
    before = rows @ _running(past, added, (at_start - at_end).exp())
    fade = (at_start.unsqueeze(-1) - own_largest).exp()[:, :, :, None, :, None]
    sums = (before.unflatten(3, (group, chunk)) * fade) + inside.unflatten(3, (group, chunk))
    return sums.transpose(2, 3).flatten(3, 4)[:, :, :, :length]


def _running(state: Tensor, added: Tensor, decay: Tensor) -> Tensor:
    """The states before each chunk: the first, then each times its decay plus what the chunk adds."""
    states = [state]
    # unbind, not an index: the gradient of an index is a tensor of zeros as large as all chunks.
    for more, factor in zip(added.unbind(2), decay[..., None, None].unbind(2), strict=False):
        states.append(states[-1] * factor + more)
    return torch.stack(states, 2)


def _chunks(length: int) -> tuple[int, int]:
    """Rows of a chunk, and how many chunks hold `length` rows."""
    chunk = min(CHUNK, length)
    return chunk, ceil_div(length, chunk)


def linear_attention_flops(
    heads: int, kv_heads: int, num_features: int, head_dim: int, lengths: tuple[int, int], mask: AttentionMask
) -> int:
    """Operations of the matmuls above for one sequence of (query_length, key_length)."""
    rows, keys = lengths
    inside = 0
    if mask.causal:
        chunk, chunks = _chunks(rows)
        rows = chunk * chunks
        keys = mask.query_offset + rows - chunk
        inside = 2 * heads * rows * chunk * (num_features + head_dim + 1)
    return 2 * num_features * (head_dim + 1) * (heads * rows + kv_heads * keys) + inside
