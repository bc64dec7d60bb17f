"""Padding in front of sequences: variants that count rows are called as if it were not there.

A decoder-only model generates from batches that are padded on the left. Blocks, strides, positions and budgets count
from row 0 of the tensors, so padding there would move them. Here each sequence's first real key becomes row 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels import BlockLayout
from astbench_registry.context import AttentionContext, AttentionOutput, AttentionStats, CacheState
from astbench_registry.mask import AttentionMask

Forward = Callable[..., AttentionOutput]
"""`forward(q, k, v, mask, scale=..., context=...)` of one variant, and its `new_cache_state`."""


def leading_padding(key_valid: Tensor | None) -> Tensor | None:
    """int64 `(batch,)`: hidden keys before each sequence's first real one; None where there are none in any.

    A sequence without a real key has none. Waits for the device.
    """
    if key_valid is None or not key_valid.numel() or bool(key_valid[:, 0].all()):
        return None
    leading = key_valid.to(torch.uint8).argmax(1)  # 0 where nothing is real
    return leading if bool(leading.any()) else None


def without_leading_padding(
    forward: Forward,
    new_cache_state: Callable[[], CacheState | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    leading: Tensor,
    scale: float | None,
    context: AttentionContext,
) -> AttentionOutput:
    """`forward`'s output for the same rows, computed with each sequence's first real key as key 0.

    Args:
        forward: The variant's.
        new_cache_state: The variant's.
        q: As for `forward`.
        k: As for `forward`.
        v: As for `forward`.
        mask: As for `forward`.
        leading: From :func:`leading_padding`.
        scale: As for `forward`.
        context: As for `forward`.
    """
    inputs = _Inputs(q, k, v, mask, context)
    if not mask.causal:
        return _rolled(forward, inputs, leading, scale)
    if torch.is_grad_enabled() and not mask.query_offset and context.summaries is None:
        # One call: a loss is a mean over the rows of all sequences, as it is where the padding lies behind them.
        got = _rolled(forward, inputs, leading, scale)
        in_front = torch.arange(q.shape[2], device=q.device) < leading[:, None]
        return got._replace(out=got.out.masked_fill(in_front[:, None, :, None], 0.0))
    return _causal(forward, new_cache_state, inputs, leading, scale)


@dataclass(frozen=True)
class _Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: AttentionMask
    context: AttentionContext

    def run(self, forward: Forward, scale: float | None) -> AttentionOutput:
        return forward(self.q, self.k, self.v, self.mask, scale=scale, context=self.context)


def _rolled(forward: Forward, inputs: _Inputs, leading: Tensor, scale: float | None) -> AttentionOutput:
    """The padding moved behind; the queries of self-attention with it. One call for all sequences."""
    mask, context = inputs.mask, inputs.context
    assert mask.key_valid is not None, "it is where the padding was seen"
    forth = roll(leading, mask.key_valid.shape[1])
    moved = replace(
        inputs,
        k=_rows(inputs.k, forth),
        v=_rows(inputs.v, forth),
        mask=replace(mask, key_valid=mask.key_valid.gather(1, forth)),
        context=replace(
            context, global_tokens=None if context.global_tokens is None else context.global_tokens.gather(1, forth)
        ),
    )
    if not mask.cross:
        hidden = context.hidden_states
        moved = replace(
            moved,
            q=_rows(inputs.q, forth),
            mask=replace(
                moved.mask, query_valid=None if mask.query_valid is None else mask.query_valid.gather(1, forth)
            ),
            context=replace(
                moved.context, hidden_states=None if hidden is None else hidden.take_along_dim(forth[..., None], 1)
            ),
        )
    got = moved.run(forward, scale)
    out = got.out if mask.cross else _rows(got.out, roll(-leading, mask.key_valid.shape[1]))
    stats = None if got.stats is None else replace(got.stats, leading=leading)
    return got._replace(out=out, stats=stats)


def roll(leading: Tensor, length: int) -> Tensor:
    """int64 `(batch, length)`: the rows in the order that puts row `leading` of each sequence first."""
    return (torch.arange(length, device=leading.device) + leading[:, None]) % length


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.take_along_dim(index[:, None, :, None], 2)


def _causal(
    forward: Forward,
    new_cache_state: Callable[[], CacheState | None],
    inputs: _Inputs,
    leading: Tensor,
    scale: float | None,
) -> AttentionOutput:
    """One call for the sequences behind equal padding, without it: in a step of decoding their offsets differ.

    Rows in front of a sequence see nothing: their output is zero. Losses are means over the sequences here; training
    does not come this way.
    """
    q, mask, state = inputs.q, inputs.mask, inputs.context.summaries
    parts: list[tuple[Tensor, int, AttentionOutput]] = []
    for front in leading.unique().tolist():
        rows = (leading == front).nonzero().squeeze(1)
        skipped = min(max(0, front - mask.query_offset), q.shape[2])  # queries that are padding themselves
        if skipped == q.shape[2]:
            continue
        kept = None
        if state is not None:
            kept = state.part(front, rows.tolist(), lambda: new_cache_state() or CacheState())
        part = _part(inputs, rows, front, skipped)
        part = replace(part, context=replace(part.context, summaries=kept))
        parts.append((rows, skipped, part.run(forward, scale)))
    return _together(inputs, leading, parts)


def _part(inputs: _Inputs, rows: Tensor, front: int, skipped: int) -> _Inputs:
    """The sequences `rows`, from key `front` and from query `skipped` on."""
    mask, context = inputs.mask, inputs.context
    assert mask.key_valid is not None, "it is where the padding was seen"
    valid, hidden, named = mask.key_valid[rows, front:], context.hidden_states, context.global_tokens
    query_valid = mask.query_valid
    return _Inputs(
        inputs.q[rows, :, skipped:],
        inputs.k[rows, :, front:],
        inputs.v[rows, :, front:],
        replace(
            mask,
            query_offset=mask.query_offset + skipped - front,
            key_valid=None if bool(valid.all()) else valid,
            query_valid=None if query_valid is None else query_valid[rows, skipped:],
        ),
        replace(
            context,
            hidden_states=None if hidden is None else hidden[rows, skipped:],
            global_tokens=None if named is None else named[rows, front:],
        ),
    )


def _together(inputs: _Inputs, leading: Tensor, parts: list[tuple[Tensor, int, AttentionOutput]]) -> AttentionOutput:
    q, v, batch = inputs.q, inputs.v, inputs.q.shape[0]
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=parts[0][2].out.dtype if parts else q.dtype)
    losses: dict[str, Tensor] = {}
    log_prob = None
    for rows, skipped, got in parts:
        behind = pad(got.out, (0, 0, skipped, 0))
        out = out.index_copy(0, rows, behind)
        for name, loss in got.losses.items():
            share = loss * (len(rows) / batch)
            losses[name] = losses[name] + share if name in losses else share
        if got.log_prob is not None:
            before = got.log_prob.new_zeros(batch) if log_prob is None else log_prob
            log_prob = before.index_copy(0, rows, got.log_prob)
    stats = _stats(inputs, leading, parts) if inputs.context.collect_stats else None
    return AttentionOutput(out, losses, stats, log_prob)


def _stats(inputs: _Inputs, leading: Tensor, parts: list[tuple[Tensor, int, AttentionOutput]]) -> AttentionStats | None:
    reported = [(rows, got.stats) for rows, _, got in parts if got.stats is not None]
    if len(reported) < len(parts):
        return None
    q, k = inputs.q, inputs.k
    attended = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    coarse = tiles = attended
    for rows, stats in reported:
        attended = attended.index_copy(0, rows, stats.attended.to(attended.dtype))
        if stats.coarse is not None:
            coarse = coarse.index_copy(0, rows, stats.coarse.to(attended.dtype))
        if stats.tiles is not None:
            tiles = tiles.index_copy(0, rows, stats.tiles.to(attended.dtype))
    some = any(stats.coarse is not None for _, stats in reported)
    tiled = any(stats.tiles is not None for _, stats in reported)
    return AttentionStats(
        attended,
        inputs.mask.visible_pairs(q, k),
        ", ".join(dict.fromkeys(stats.backend for _, stats in reported)),
        _layout(inputs, [(rows, stats.layout) for rows, stats in reported]),
        coarse if some else None,
        leading,
        tiles if tiled else None,
    )


def _layout(inputs: _Inputs, parts: list[tuple[Tensor, BlockLayout | None]]) -> BlockLayout | None:
    """The parts' lists in one grid; possible where all sequences begin in this call."""
    layouts = [layout for _, layout in parts if layout is not None]
    if not layouts or len(layouts) < len(parts) or any(layout.query_offset for layout in layouts):
        return None
    first = layouts[0]
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    groups = -(-queries // first.query_group)
    width, heads = max(x.indices.shape[-1] for x in layouts), first.indices.shape[1]
    indices = first.indices.new_zeros(inputs.q.shape[0], heads, groups, width)
    counts = first.counts.new_zeros(indices.shape[:3])
    since = None if first.since is None else first.since.new_zeros(indices.shape)
    for (rows, _), layout in zip(parts, layouts, strict=True):
        count, wide = layout.indices.shape[2:]
        indices[rows, :, :count, :wide] = layout.indices.expand(len(rows), -1, -1, -1)
        counts[rows, :, :count] = layout.counts.expand(len(rows), -1, -1)
        if since is not None and layout.since is not None:
            since[rows, :, :count, :wide] = layout.since.expand(len(rows), -1, -1, -1)
    return replace(first, indices=indices, counts=counts, since=since, query_length=queries, key_length=keys)


def attended_tokens(stats: AttentionStats, mask: AttentionMask) -> Tensor:
    """Bool `(batch, list_heads, query_length, key_length)`: the pairs that a reported layout holds, in the call's rows.

    Args:
        stats: With a layout.
        mask: The call's.
    """
    layout, leading, valid = stats.layout, stats.leading, mask.key_valid
    assert layout is not None, "statistics without a layout"
    if leading is None:
        return layout.token_mask(causal=mask.causal, key_valid=valid)
    forth = roll(leading, layout.key_length)
    moved = layout.token_mask(causal=mask.causal, key_valid=None if valid is None else valid.gather(1, forth))
    back = roll(-leading, layout.key_length)
    moved = moved.take_along_dim(back[:, None, None, :], 3)
    if mask.cross:
        return moved
    pairs = moved.take_along_dim(back[:, None, :, None], 2)
    if not mask.causal:
        return pairs
    # The last group of a sequence may hold rows behind its end, which were rolled to its front.
    real = torch.arange(layout.query_length, device=leading.device) >= leading[:, None]
    return pairs & real[:, None, :, None]
