"""A decoding step: one query row, which gathers its own keys token by token.

The other schedules lay blocks of keys and tiles of queries out first, which for one row is most of the work: a tile
would hold one row, and the whole cache would be copied to fill its last block. Plain torch; gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`; `layout` has a list for every key/value head at least.

    Cost: O(listed keys x head_dim) time, whatever the length of the cache; O(CHUNK_BYTES) memory, or one list's keys.
    """
    batch, heads, lists = len(q), q.shape[1], layout.indices.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    tokens, hidden = _listed_tokens(layout, causal, key_valid)
    unit = torch.arange(batch * lists, device=q.device)
    kv_head = unit // lists * k.shape[1] + unit % lists * k.shape[1] // lists
    tokens = tokens + kv_head[:, None] * k.shape[2]
    keys, values = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])  # no copies: a cache lies in one piece
    queries = q.reshape(batch * lists, heads // lists, q.shape[-1]).to(compute) * scale
    bias = None
    if block_bias is not None:
        bias = block_bias[:, :, 0, : tokens.shape[1] // layout.block_size].flatten(0, 1).to(compute)
        bias = bias.repeat_interleave(layout.block_size, 1)
    found = []
    together = max(1, rules.CHUNK_BYTES // (tokens.shape[1] * k.shape[-1] * compute.itemsize))
    # Without gradients every piece is gathered to the same place, which saves asking for memory: half of the time.
    inputs = [x for x in (q, k, v, block_bias) if x is not None]
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    rooms = [None if learning else x.new_empty(together * tokens.shape[1], x.shape[1]) for x in (keys, values)]
    for start in range(0, len(unit), together):
        part = slice(start, start + together)
        # What hidden memory holds never matters, NaN included: a product would keep it.
        unseen = hidden[part].flatten().nonzero().squeeze(-1)
        places = tokens[part]
        key, value = (
            _gathered(x, places, room).to(compute).index_fill_(0, unseen, 0.0).view(*places.shape, x.shape[1])
            for x, room in zip((keys, values), rooms, strict=True)
        )
        logits = queries[part] @ key.transpose(1, 2)
        logits = logits if bias is None else logits + bias[part, None]
        found.append(_softmax(logits.masked_fill(hidden[part, None], -torch.inf), value))
    out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
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


def _gathered(x: Tensor, places: Tensor, room: Tensor | None) -> Tensor:
    """Rows of `x` at all places, one after the other, in memory of their own or in `room`."""
    index = places.flatten()
    return x.index_select(0, index) if room is None else torch.index_select(x, 0, index, out=room[: len(index)])


def _softmax(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of values, and the log-sum-exp; 0 and -inf for rows that see nothing."""
    blind = (logits.detach() == -torch.inf).all(-1)  # of these the gradient of a softmax would be NaN
    seen = logits.masked_fill(blind[..., None], 0.0)
    out = (torch.softmax(seen, -1) @ value).masked_fill(blind[..., None], 0.0)
    return out, torch.logsumexp(seen, -1).masked_fill(blind, -torch.inf)
