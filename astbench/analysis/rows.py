"""Facts of some query rows of one attention call: what they kept, and where their attention really goes.

"Mass" is dense softmax attention of the same queries and keys. "Kept" is what the lists let a row see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels import BlockLayout
from astbench_registry.block_selection import Call
from astbench_registry.block_selection.dense_weights import dense_weights

GOLDEN = (math.sqrt(5) - 1) / 2

DISTANCES = 18
"""Bins of distance: 0, 1, 2 to 3, 4 to 7, ... tokens; the last one is open."""


@dataclass(frozen=True)
class RowFacts:
    """Facts of `rows` of every sequence of a call; H is the number of query heads.

    Attributes:
        real: Bool `(batch, rows)`: rows that are no padding and see something.
        place: float32 `(batch, rows)`: where a row stands in its sequence, 0 to 1.
        kept: float32 `(batch, H, rows)`: share of the visible keys that the row sees.
        mass: The same shape: share of its mass on them.
        best: The same shape: mass on as many blocks, had the ones with most mass been chosen.
        bits: The same shape: entropy of its dense attention.
        heads: float32 `(batch, rows)`: overlap (intersection over union) of two heads' blocks, mean over pairs; NaN
            for a single head.
        chosen: Bool `(batch, H, rows, blocks)`: visible blocks that it sees.
        mass_of_block: float32, as `chosen`: share of its mass.
        kept_by_distance: float64 `(H, DISTANCES)`: pairs kept.
        seen_by_distance: float64 `(DISTANCES,)`: pairs visible.
        mass_by_distance: float64 `(H, DISTANCES)`: mass.
        kept_of_key: float64 `(batch, H, keys)`: rows that keep the key.
        seen_of_key: float64 `(batch, keys)`: rows that could see it.
        mass_of_key: float64 `(batch, H, keys)`: mass on it.
    """

    real: Tensor
    place: Tensor
    kept: Tensor
    mass: Tensor
    best: Tensor
    bits: Tensor
    heads: Tensor
    chosen: Tensor
    mass_of_block: Tensor
    kept_by_distance: Tensor
    seen_by_distance: Tensor
    mass_by_distance: Tensor
    kept_of_key: Tensor
    seen_of_key: Tensor
    mass_of_key: Tensor


def sampled_rows(length: int, most: int, device: torch.device) -> Tensor:
    """int64: at most so many rows, one of each of as many equal parts, at all places in their blocks alike.

    Within its part a row's place moves on by the golden ratio: at equal distances, which blocks divide too, all would
    stand at one place in their blocks.
    """
    if length <= most:
        return torch.arange(length, device=device)
    part = torch.arange(most, device=device, dtype=torch.float64)
    return ((part + (0.5 + part * GOLDEN) % 1.0) * length / most).long()


@torch.no_grad()
def row_facts(call: Call, layout: BlockLayout, rows: Tensor) -> RowFacts:
    """Facts of some rows of a call.

    Args:
        call: What the attention was given.
        layout: The lists that it chose.
        rows: int64: which query rows, the same of every sequence.

    Cost: O(batch x heads x rows x keys) time and memory.
    """
    call = call.without_padding()
    heads, keys = call.q.shape[1], call.k.shape[2]
    weights = dense_weights(call, rows).float()
    seen = visible(call, rows)  # (batch, rows, keys)
    chosen = chosen_blocks(layout.expand_heads(heads), rows)
    block = torch.arange(keys, device=rows.device) // layout.block_size
    kept = chosen[..., block] & seen[:, None]
    sizes = _by_block(seen.float(), layout)  # visible keys of each block
    mass = _by_block(weights, layout)
    chosen = chosen & (sizes > 0)[:, None]
    counted = seen.sum(-1)
    real = counted > 0
    valid = call.mask.valid_queries(call.q.shape[2])
    if valid is not None:
        real &= valid[:, rows]
    kept, seen = kept & real[:, None, :, None], seen & real[..., None]
    distance = distances(call, rows)
    return RowFacts(
        real=real,
        place=_place(call, rows),
        kept=kept.sum(-1) / counted.clamp(min=1)[:, None],
        mass=(weights * kept).sum(-1),
        best=_best(mass, chosen.sum(-1)),
        bits=torch.special.entr(weights).sum(-1) / math.log(2),
        heads=overlap_of_heads(chosen),
        chosen=chosen & real[:, None, :, None],
        mass_of_block=mass,
        kept_by_distance=_binned(kept.double().sum(0), distance),
        seen_by_distance=_binned(seen.double().sum(0)[None], distance)[0],
        mass_by_distance=_binned(weights.double().sum(0), distance),
        kept_of_key=kept.double().sum(2),
        seen_of_key=seen.double().sum(1),
        mass_of_key=weights.double().sum(2),
    )


def visible(call: Call, rows: Tensor) -> Tensor:
    """Bool `(batch, rows, keys)`: what dense attention would see."""
    mask, keys = call.mask, torch.arange(call.k.shape[2], device=rows.device)
    seen = torch.ones(call.q.shape[0], len(rows), len(keys), dtype=torch.bool, device=rows.device)
    if mask.causal:
        seen &= keys <= (rows + mask.query_offset)[:, None]
    if mask.key_valid is not None:
        seen &= mask.key_valid[:, None]
    return seen


def chosen_blocks(layout: BlockLayout, rows: Tensor) -> Tensor:
    """Bool `(batch, list_heads, rows, blocks)`: blocks that each row's list holds, of carried lists by that row."""
    first = layout.first_rows()[:, :, layout.row_groups()[rows]]
    return first <= layout.row_offsets()[rows][:, None]


def seen_blocks(call: Call, layout: BlockLayout, rows: Tensor) -> Tensor:
    """Bool `(batch, heads, rows, blocks)`: :func:`chosen_blocks` of which the row sees a key."""
    held = _by_block(visible(call, rows).float(), layout) > 0
    return chosen_blocks(layout.expand_heads(call.q.shape[1]), rows) & held[:, None]


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of two sets of blocks along the last axis; NaN where both are empty."""
    both, either = (one & other).sum(-1), (one | other).sum(-1)
    return both / either.where(either > 0, torch.nan)


def overlap_of_heads(chosen: Tensor) -> Tensor:
    """float32 `(batch, rows)`: mean over pairs of heads of the overlap of their blocks."""
    heads = chosen.shape[1]
    if heads < 2:
        return torch.full((chosen.shape[0], chosen.shape[2]), torch.nan, device=chosen.device)
    sets = chosen.float().transpose(1, 2)  # (batch, rows, heads, blocks)
    both = sets @ sets.transpose(-1, -2)
    count = sets.sum(-1)
    either = count[..., :, None] + count[..., None, :] - both
    pairs = both / either.where(either > 0, torch.nan)
    above = torch.ones(heads, heads, dtype=torch.bool, device=chosen.device).triu(1)
    return pairs[..., above].nanmean(-1)


def _best(mass: Tensor, count: Tensor) -> Tensor:
    """Mass of the `count` heaviest blocks."""
    total = pad(mass.sort(-1, descending=True).values.cumsum(-1), (1, 0))
    return total.gather(-1, count[..., None])[..., 0]


def _by_block(of_keys: Tensor, layout: BlockLayout) -> Tensor:
    missing = layout.num_blocks * layout.block_size - of_keys.shape[-1]
    return pad(of_keys, (0, missing)).unflatten(-1, (layout.num_blocks, layout.block_size)).sum(-1)


def distances(call: Call, rows: Tensor) -> Tensor:
    """int64 `(rows, keys)`: the bin of each pair's distance; of cross-attention, which has none, all in the first."""
    keys = torch.arange(call.k.shape[2], device=rows.device)
    if call.mask.cross:
        return torch.zeros(len(rows), len(keys), dtype=torch.int64, device=rows.device)
    apart = ((rows + call.mask.query_offset)[:, None] - keys).abs()
    return torch.where(apart > 0, apart.float().clamp(min=1).log2().floor().long() + 1, 0).clamp(max=DISTANCES - 1)


def _binned(of_pairs: Tensor, distance: Tensor) -> Tensor:
    """float64 `(heads, DISTANCES)` of `(heads, rows, keys)`."""
    flat = of_pairs.flatten(1)
    return flat.new_zeros(flat.shape[0], DISTANCES).scatter_add_(1, distance.flatten().expand_as(flat), flat)


def _place(call: Call, rows: Tensor) -> Tensor:
    """How far into its sequence a row stands, padding apart."""
    valid = call.mask.valid_queries(call.q.shape[2])
    if valid is None:
        valid = torch.ones(call.q.shape[0], call.q.shape[2], dtype=torch.bool, device=rows.device)
    before = valid.float().cumsum(1) - 1
    return (before / (valid.sum(1, keepdim=True) - 1).clamp(min=1)).clamp(min=0)[:, rows]
