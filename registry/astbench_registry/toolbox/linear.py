"""Attention whose weights are products of features, phi(q) . phi(k), in time and memory linear in the lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.layout import ceil_div
from astbench_registry.interface import AttentionShape
from astbench_registry.mask import AttentionMask

CHUNK = 64
"""Causal rows handled together. Fastest or within 10% of it on one CPU core, forward and backward, of 32 to 512
rows, at 512, 2048 and 8192 tokens, 64 and 256 features, head_dim 64."""

PIECE_BYTES = 2**21
"""Features held at a time on a CPU. Of 2^19 to 2^22, forward and backward, on one core with 512 KiB of second-level
cache: none is faster throughout, and all are flat from 2048 to 16384 tokens, where whole sequences are not."""

LOWEST = -1e30
"""Log scale of a key that is not there: finite, so that differences of two of them are no NaN."""

Features = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Of `(..., rows, head_dim)`: phi, not negative, `(..., rows, num_features)`, and a log scale `(..., rows)` or None."""


class _State(NamedTuple):
    """What is kept of the keys so far.

    Attributes:
        sums: `(batch, kv_heads, features, head_dim + 1)`: sum of exp(s_j - largest) phi(k_j) [v_j, 1]^T.
        largest: `(batch, kv_heads, 1)`: the largest s_j.
    """

    sums: Tensor
    largest: Tensor


def normalised_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, features: Features, num_features: int
) -> Tensor:
    """Average of the values with weights phi(q_i) . phi(k_j) over the visible keys.

        out_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = (phi(q_i) . phi(k_j)) exp(s_j)

    Everything is computed from sums over keys of phi(k_j) v_j^T. The true features of a key may be too large or
    too small for floating point, so they come as phi(k_j) and a logarithm s_j; every row is computed relative
    to the largest s_j *that it sees*, never to a later key's or another sequence's. Any positive factor on a
    query's features cancels, and so its s is not read.

    Features are computed for a piece of the sequence at a time: those of a whole sequence fall out of a CPU's
    cache. For the backward pass they are kept: computing them once more took longer at every length measured.

    Args:
        q: `(batch, num_heads, query_length, head_dim)`, float32 or float64.
        k: `(batch, num_kv_heads, key_length, head_dim)`, of the same dtype.
        v: As `k`.
        mask: Pattern, offset and padding.
        features: phi and s.
        num_features: How many phi has.

    Returns:
        `(batch, num_heads, query_length, head_dim)`. Zero where nothing is visible, and where the visible
        weights are too small to divide by (their sum is below 1e-28 in float32).

    Cost: O((N + M) num_features head_dim) time. Memory O((N + M) head_dim) and one piece's features; causal: for
        each CHUNK rows and head of the piece CHUNK x CHUNK weights and a state of num_features x head_dim. With
        gradients all of this is kept, for all pieces.
    """
    q, k, v = mask.without_padding(q, k, v)
    valid = mask.key_valid
    if valid is None:
        valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
    # The last column adds up the weights. Padding is kept out by its zeros, whatever its features are.
    values = pad(v, (0, 1), value=1.0).masked_fill(~valid[:, None, :, None], 0.0)
    length, rows = q.shape[2], _rows_per_piece(q, num_features)
    before = mask.query_offset if mask.causal else k.shape[2]  # keys that every query sees
    state = _State(k.new_zeros(*k.shape[:2], num_features, values.shape[-1]), k.new_full((*k.shape[:2], 1), LOWEST))
    for start in range(0, before, rows):
        keys = slice(start, min(start + rows, before))
        state = _add(features, state, k[:, :, keys], values[:, :, keys], valid[:, keys])

    q = q.unflatten(1, (k.shape[1], -1))  # (batch, kv_heads, group, queries, head_dim)
    missing = before + length - k.shape[2]  # negative when there are later keys, which this cuts off
    if mask.causal:
        k, values, valid = pad(k, (0, 0, 0, missing)), pad(values, (0, 0, 0, missing)), pad(valid, (0, missing))
    outs = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        queries, own = q[:, :, :, start:stop], slice(before + start, before + stop)
        if mask.causal:
            inputs = queries, k[:, :, own], values[:, :, own], valid[:, own]
            out, state = _read_and_add(features, state, *inputs, chunk=min(CHUNK, length), more=stop < length)
        else:
            out = _read(features, state, queries)
        outs.append(out)
    return torch.cat(outs, 3).flatten(1, 2)


def _rows_per_piece(q: Tensor, num_features: int) -> int:
    """A multiple of CHUNK; on other devices than a CPU one piece is everything."""
    if q.device.type != "cpu":
        return 2**62
    row = q.shape[0] * q.shape[1] * num_features * q.element_size()
    return max(1, PIECE_BYTES // max(1, row) // CHUNK) * CHUNK


def _key_features(features: Features, k: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Phi and s of keys `(batch, kv_heads, ..., head_dim)`; s is LOWEST where `valid` `(batch or 1, ...)` is False."""
    phi, log_scale = features(k)
    if log_scale is None:
        log_scale = phi.new_zeros(phi.shape[:-1])
    return phi, log_scale.masked_fill(~valid[:, None], LOWEST)


def _sums(phi: Tensor, values: Tensor, log_scale: Tensor, reference: Tensor) -> Tensor:
    """`(..., features, head_dim + 1)`: the sum over keys of exp(s - reference) phi(k) [v, 1]^T."""
    return phi.transpose(-1, -2) @ (values * (log_scale - reference).exp().unsqueeze(-1))


def _add(features: Features, state: _State, k: Tensor, values: Tensor, valid: Tensor) -> _State:
    """The state after more keys, `(batch, kv_heads, keys, head_dim)`."""
    phi, log_scale = _key_features(features, k, valid)
    largest = torch.maximum(state.largest, log_scale.detach().amax(-1, keepdim=True))
    fade = (state.largest - largest).exp().unsqueeze(-1)
    return _State(state.sums * fade + _sums(phi, values, log_scale, largest), largest)


def _read(features: Features, state: _State, q: Tensor) -> Tensor:
    """What queries `(batch, kv_heads, group, queries, head_dim)` get from all keys of the state."""
    phi, _ = features(q.flatten(2, 3))
    return _normalised((phi @ state.sums).unflatten(2, q.shape[2:4]))


def _read_and_add(
    features: Features,
    state: _State,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    valid: Tensor,
    *,
    chunk: int,
    more: bool,
) -> tuple[Tensor, _State]:
    """Prefix sums by chunks: row i reads the state of all earlier chunks and its own chunk's keys up to itself.

    Row i is relative to exp(largest s up to its position). `more`: the state after these keys is asked for.
    """
    group, length = q.shape[2:4]
    chunks = ceil_div(length, chunk)
    missing = chunks * chunk - length
    q, k, values = (pad(x, (0, 0, 0, missing)) for x in (q, k, values))
    valid = pad(valid, (0, missing)).unflatten(1, (chunks, chunk))
    k, values = (x.unflatten(2, (chunks, chunk)) for x in (k, values))
    phi, log_scale = _key_features(features, k, valid)
    rows, _ = features(q.unflatten(3, (chunks, chunk)).transpose(2, 3).flatten(3, 4))  # (..., chunks, group * chunk, m)
    largest = torch.maximum(log_scale.detach().flatten(2).cummax(-1).values, state.largest).view_as(log_scale)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    relative = (log_scale.unsqueeze(-2) - largest.unsqueeze(-1)).masked_fill(later, -torch.inf).exp()
    weights = (rows @ phi.transpose(-1, -2)).unflatten(3, (group, chunk)) * relative.unsqueeze(3)
    inside = weights.flatten(3, 4) @ values

    at_end = largest[..., -1]  # (batch, kv_heads, chunks)
    at_start = torch.cat([state.largest, at_end[..., :-1]], -1)
    wanted = chunks if more else chunks - 1
    added = _sums(*(x[:, :, :wanted] for x in (phi, values, log_scale, at_end.unsqueeze(-1))))
    states = [state.sums]
    # unbind, not an index: the gradient of an index is a tensor of zeros as large as all chunks.
    for plus, factor in zip(added.unbind(2), (at_start - at_end).exp()[..., None, None].unbind(2), strict=False):
        states.append(states[-1] * factor + plus)
    fade = (at_start.unsqueeze(-1) - largest).exp()[:, :, :, None, :, None]
    earlier = rows @ torch.stack(states[:chunks], 2)
    sums = earlier.unflatten(3, (group, chunk)) * fade + inside.unflatten(3, (group, chunk))
    out = _normalised(sums.transpose(2, 3).flatten(3, 4)[:, :, :, :length])
    return out, _State(states[-1], at_end[..., -1:])


def _normalised(sums: Tensor) -> Tensor:
    """Sums of weighted values by the sum of the weights, their last column."""
    # Not the smallest number itself: the gradient divides by the sum once more.
    least = torch.finfo(sums.dtype).tiny ** 0.75
    total = sums[..., -1:]
    return (sums[..., :-1] / total.clamp(min=least)).masked_fill(total < least, 0.0)


def linear_attention_flops(
    shape: AttentionShape, num_features: int, lengths: tuple[int, int], mask: AttentionMask, *, per_vector: int = 0
) -> int:
    """Operations of the matmuls above for one sequence of (query_length, key_length).

    Args:
        shape: Heads and head_dim.
        num_features: Of phi.
        lengths: Queries and keys.
        mask: Pattern and offset.
        per_vector: Operations of the matmuls in phi, for one query or key.
    """
    rows, keys = lengths
    inside, summed = 0, keys
    if mask.causal:
        chunk = min(CHUNK, rows)
        rows = ceil_div(rows, chunk) * chunk
        keys = mask.query_offset + rows
        summed = keys - chunk
        inside = 2 * shape.num_heads * rows * chunk * (num_features + shape.head_dim + 1)
    state = 2 * num_features * (shape.head_dim + 1) * (shape.num_heads * rows + shape.num_kv_heads * summed)
    return state + inside + per_vector * (shape.num_heads * rows + shape.num_kv_heads * keys)
