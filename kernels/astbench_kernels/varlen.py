"""Sequences of unequal lengths, packed one behind the other without padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from astbench_kernels.attention import block_sparse_attention
from astbench_kernels.layout import BlockLayout


def block_sparse_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`block_sparse_attention` of packed sequences, each of which sees only its own keys.

    Tensors and offsets are packed as for flash-attn's `flash_attn_varlen_func`; the layout tells the longest lengths.
    Unlike there a causal mask begins at the first token of both, whatever the lengths. Within, the sequences lie side
    by side as one batch of the longest's length: that takes its memory, and a copy of the tensors, but no attention,
    since the lists of rows that do not exist count as empty and what they name of keys behind a sequence's end is
    masked.

    Args:
        q: Queries, `(total queries, heads, head_dim)`.
        k: Keys, `(total keys, kv_heads, head_dim)`.
        v: Values, `(total keys, kv_heads, value_dim)`.
        layout: Lists of each sequence, `(sequences, list_heads, groups, width)`, for as many queries and keys as the
            longest sequence has, without a query offset. Groups and blocks count from each sequence's own first token.
        cu_seqlens_q: Integers `(sequences + 1,)`: where each sequence's queries begin, the total last.
        cu_seqlens_k: Likewise of the keys.
        block_bias: As there, aligned with `layout.indices`.
        scale: As there.
        causal: Query i of a sequence sees its keys 0 to i.
        backend: As there.

    Returns:
        `out` `(total queries, heads, value_dim)` and the log-sum-exp `(total queries, heads)`, dtypes and gradients as
        there.

    Raises:
        ValueError: offsets that do not fit the tensors or the layout, and as there.

    Cost: as there, and O(sequences x longest) memory; it waits for the device to read the offsets.
    """
    queries = _Packed("cu_seqlens_q", cu_seqlens_q, "queries", q, layout.query_length)
    keys = _Packed("cu_seqlens_k", cu_seqlens_k, "keys", k, layout.key_length)
    sequences = [len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1, layout.indices.shape[0]]
    if len(set(sequences)) > 1:
        raise ValueError("cu_seqlens_q tells of {} sequences, cu_seqlens_k of {}, the layout of {}".format(*sequences))
    if layout.indices.device != q.device or k.device != q.device or v.device != q.device:
        raise ValueError(f"q is on {q.device}; k, v and the layout must be there too")
    if layout.query_offset or layout.key_stride != 1:
        raise ValueError("packed sequences take a layout without query_offset and with a key_stride of 1")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"k and v differ: {tuple(k.shape)} and {tuple(v.shape)}")
    start = torch.arange(layout.num_groups, device=q.device) * layout.query_group
    exists = start < queries.lengths[:, None]
    position = torch.arange(layout.key_length, device=k.device)
    out, lse = block_sparse_attention(
        queries.unpack(q),
        keys.unpack(k),
        keys.unpack(v),
        replace(layout, counts=layout.counts * exists[:, None]),
        block_bias=block_bias,
        scale=scale,
        causal=causal,
        key_valid=position < keys.lengths[:, None],
        backend=backend,
    )
    return queries.pack(out), queries.pack(lse)


INTEGERS = (torch.int32, torch.int64)


class _Packed:
    """Where the rows of packed sequences lie when these are a batch."""

    def __init__(self, name: str, offsets: Tensor, what: str, x: Tensor, longest: int) -> None:
        if not isinstance(offsets, Tensor) or offsets.dim() != 1 or len(offsets) < 2 or offsets.dtype not in INTEGERS:
            got = f"{offsets.dtype} {tuple(offsets.shape)}" if isinstance(offsets, Tensor) else type(offsets).__name__
            raise ValueError(f"{name} must be an integer tensor (sequences + 1,), got {got}")
        if x.dim() != 3:
            raise ValueError(f"the {what} must be (total, heads, dim), got {tuple(x.shape)}")
        begins = offsets.tolist()
        if begins[0] != 0 or begins[-1] != x.shape[0]:
            raise ValueError(f"{name} goes from {begins[0]} to {begins[-1]}, must go from 0 to the {x.shape[0]} {what}")
        lengths = [stop - start for start, stop in pairwise(begins)]
        if min(lengths) < 0:
            raise ValueError(f"{name} falls behind entry {next(i for i, n in enumerate(lengths) if n < 0)}")
        if max(lengths) != longest:
            raise ValueError(f"the layout is for {longest} {what}, the longest sequence of {name} has {max(lengths)}")
        self._longest = longest
        self.lengths = torch.tensor(lengths, device=x.device)
        behind = self.lengths.new_tensor([i * longest - begin for i, begin in enumerate(begins[:-1])])
        shift = torch.repeat_interleave(behind, self.lengths, output_size=x.shape[0])
        self._place = torch.arange(x.shape[0], device=x.device) + shift

    def unpack(self, x: Tensor) -> Tensor:
        """`(total, heads, d)` -> `(sequences, heads, longest, d)`, zeros behind each sequence's end."""
        room = x.new_zeros(len(self.lengths) * self._longest, *x.shape[1:])
        return room.index_copy(0, self._place, x).unflatten(0, (len(self.lengths), self._longest)).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """`(sequences, heads, longest, ...)` -> `(total, heads, ...)`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self._place)
