"""A decoding step: one query row, which gathers its own keys token by token.

The other schedules lay blocks of keys and tiles of queries out first, which for one row is most of the work: a tile
would hold one row, and the whole cache would be copied to fill its last block. torch's fused kernel for CPUs does the
rest; where lists name a large part of the keys, it reads all of them in place. With gradients, and on other devices,
plain torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from astbench_kernels.arguments import wants_gradients
from astbench_kernels.backends.cpu.fused import fused, room
from astbench_kernels.dispatch import rules
from astbench_kernels.layout import BlockLayout, last_key


def one_row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_bias: Tensor | None,
    layout: BlockLayout,
    scale: float,
    causal: bool,
    key_valid: Tensor | None,
    *,
    whole: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`; with `whole` all keys are read in place.

    `layout` has a list for every key/value head at least.

    Cost: O(listed keys x head_dim) time, whatever the length of the cache, with `whole` O(keys x head_dim);
    O(ROW_BYTES) memory, or one list's keys. Where :func:`is_fused` says no, memory for all lists' keys.
    """
    in_steps = not is_fused(q, k, v, block_bias)
    if whole and not in_steps:
        out, lse = _whole(q, k, v, scale, layout, causal, key_valid)
        # NaN or infinity in a key that no list names would show. It is looked for here, for looking at the whole cache
        # beforehand would take as long as the step.
        if math.isfinite(float(out.sum(dtype=lse.dtype))):
            return out, lse
    tokens, hidden = _listed_tokens(layout, causal, key_valid)
    if in_steps:
        return _in_steps(q, k, v, block_bias, layout, scale, tokens, hidden)
    return _gathered(q, k, v, scale, tokens, hidden)


def is_fused(q: Tensor, k: Tensor, v: Tensor, block_bias: Tensor | None) -> bool:
    """Whether torch's fused kernel for CPUs computes a step; else plain torch does, on any device."""
    learns = wants_gradients(q, k, v, block_bias)
    return q.device.type == "cpu" and not learns and block_bias is None and k.shape[-1] == v.shape[-1]


def _whole(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: BlockLayout, causal: bool, key_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All keys by torch's fused kernel, those that are not listed masked: the heads of a list are its rows."""
    batch, kv_heads, keys = k.shape[:3]
    lists, rows = layout.indices.shape[1], q.shape[1] // kv_heads
    stop = (layout.query_offset + 1) // layout.key_stride
    seen = layout.slots[:, :, 0]
    if layout.since is not None:
        seen = seen & (layout.since[:, :, 0] <= layout.query_offset % layout.query_group)
    queries = q.reshape(batch, kv_heads, rows, -1)
    listed = seen.shape[-1] == layout.num_blocks and bool(seen.all())
    if listed and key_valid is None and not (causal and stop < keys):
        out, lse = fused(queries, k, v, None, scale)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])
    block = torch.where(seen, layout.indices[:, :, 0], layout.num_blocks).long()
    blocks = torch.full((batch, lists, layout.num_blocks + 1), -torch.inf, dtype=q.dtype, device=q.device)
    blocks = blocks.scatter_(-1, block, 0.0)[..., : layout.num_blocks]
    mask = blocks.repeat_interleave(layout.block_size, -1)[..., :keys]
    if causal and stop < keys:
        mask[..., stop:] = -torch.inf
    if key_valid is not None:
        mask = mask.masked_fill(~key_valid[:, None], -torch.inf)
    mask = mask.view(batch, kv_heads, -1, keys).repeat_interleave(rows * kv_heads // lists, 2)
    out, lse = fused(queries, k, v, mask, scale)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _gathered(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The listed keys, laid one after the other, by torch's fused kernel."""
    units, width = tokens.shape
    rows = q.shape[0] * q.shape[1] // units
    places = _places(tokens, k)
    keys, values = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])  # no copies: a cache lies in one piece
    queries = q.reshape(units, 1, rows, -1)
    together = max(1, rules.ROW_BYTES // (width * k.shape[-1] * k.element_size()))
    size = min(units, together) * width
    held = room(2 * size * keys.shape[1], keys)
    rooms = [held[: size * keys.shape[1]].view(size, -1), held[size * keys.shape[1] :].view(size, -1)]
    found = []
    for start in range(0, units, together):
        part = slice(start, start + together)
        index = places[part].flatten()
        # What hidden memory holds never matters, NaN included: a product would keep it.
        unseen = hidden[part].flatten().nonzero().squeeze(-1)
        key, value = (
            torch.index_select(x, 0, index, out=into[: len(index)])
            .index_fill_(0, unseen, 0.0)
            .view(-1, 1, width, x.shape[1])
            for x, into in zip((keys, values), rooms, strict=True)
        )
        found.append(_fused(queries[part], key, value, hidden[part, None, None].expand(-1, 1, rows, -1), scale))
    out, lse = (torch.cat(parts) for parts in zip(*found, strict=True)) if len(found) > 1 else found[0]
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _fused(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp in float32 or float64; `unseen` is bool `(batch, heads, rows, keys)`."""
    mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill_(unseen, -torch.inf)
    return fused(q, k, v, mask, scale)


def _places(tokens: Tensor, k: Tensor) -> Tensor:
    """int64 `(units, keys)`: the rows of `k.reshape(-1, d)` where each list's keys lie."""
    batch, kv_heads, keys = k.shape[:3]
    lists = len(tokens) // batch
    unit = torch.arange(len(tokens), device=k.device)
    kv_head = unit // lists * kv_heads + unit % lists * kv_heads // lists
    return tokens + kv_head[:, None] * keys


def _in_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_bias: Tensor | None,
    layout: BlockLayout,
    scale: float,
    tokens: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """With gradients by autograd, a bias of blocks, and values of another size than keys."""
    batch, heads = q.shape[:2]
    compute = torch.promote_types(q.dtype, torch.float32)
    places = _places(tokens, k)
    queries = q.reshape(len(tokens), batch * heads // len(tokens), q.shape[-1]).to(compute) * scale
    # What hidden memory holds never matters, NaN included: a product would keep it.
    unseen = hidden.flatten().nonzero().squeeze(-1)
    key, value = (
        x.reshape(-1, x.shape[-1])
        .index_select(0, places.flatten())
        .to(compute)
        .index_fill(0, unseen, 0.0)
        .view(*places.shape, x.shape[-1])
        for x in (k, v)
    )
    logits = queries @ key.transpose(1, 2)
    if block_bias is not None:
        bias = block_bias[:, :, 0, : tokens.shape[1] // layout.block_size].flatten(0, 1).to(compute)
        logits = logits + bias.repeat_interleave(layout.block_size, 1)[:, None]
    out, lse = _softmax(logits.masked_fill(hidden[:, None], -torch.inf), value)
    return out.reshape(batch, heads, 1, v.shape[-1]).to(q.dtype), lse.reshape(batch, heads, 1)


def _listed_tokens(layout: BlockLayout, causal: bool, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 and bool `(units, keys)`: the keys of each list, and those of them that the row may not see."""
    width = max(1, int(layout.counts.max()))
    blocks = layout.indices[:, :, 0, :width]
    tokens = blocks.long()[..., None] * layout.block_size + torch.arange(layout.block_size, device=blocks.device)
    hidden = ~layout.slots[:, :, 0, :width, None] | (tokens >= layout.key_length)
    if layout.since is not None:
        hidden = hidden | (layout.since[:, :, 0, :width, None] > layout.query_offset % layout.query_group)
    if causal:
        position = torch.tensor(layout.query_offset, device=blocks.device)
        hidden = hidden | (tokens > last_key(position, layout.key_stride))
    tokens = tokens.masked_fill(hidden, 0).flatten(2)
    hidden = hidden.flatten(2)
    if key_valid is not None:
        hidden = hidden | ~key_valid[:, None].expand(-1, tokens.shape[1], -1).gather(2, tokens)
    return tokens.flatten(0, 1), hidden.flatten(0, 1)


def _softmax(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of values, and the log-sum-exp; 0 and -inf for rows that see nothing."""
    blind = (logits.detach() == -torch.inf).all(-1)  # of these the gradient of a softmax would be NaN
    seen = logits.masked_fill(blind[..., None], 0.0)
    out = (torch.softmax(seen, -1) @ value).masked_fill(blind[..., None], 0.0)
    return out, torch.logsumexp(seen, -1).masked_fill(blind, -torch.inf)
