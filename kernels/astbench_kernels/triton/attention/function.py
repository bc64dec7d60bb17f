"""The Triton kernels as one differentiable function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from astbench_kernels.arguments import wants_gradients
from astbench_kernels.layout import BlockLayout, ceil_div
from astbench_kernels.triton.attention import decode, key_major, query_major
from astbench_kernels.triton.attention.lists import TransposedLists, block_states, order_lists, transpose_lists
from astbench_kernels.triton.launch import launch, rows_contiguous
from astbench_kernels.triton.plan import MAX_SPLITS, Plan, Schedule, Tile, make_plan, padded_dim
from astbench_kernels.triton.tiles import LOG2E

_Arguments = dict[str, Any]


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    block_bias: Tensor | None,
    scale: float,
    causal: bool,
    key_valid: Tensor | None,
    schedule: Schedule | None = None,
    arch: int | None = None,
    one_pass: bool = False,
    hopper: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`; the last four are for `make_plan`.

    Cost: O(query rows x listed keys) time. Beside inputs, outputs and gradients, memory for the lists once more
    (twice in the backward pass) and, where few rows share a list, PARTIAL_BYTES. The decode schedule makes no lists;
    it holds up to MAX_SPLITS float32 outputs.
    """
    gradients = wants_gradients(q, k, v, block_bias)
    plan = make_plan(
        q,
        k,
        v,
        layout,
        causal=causal,
        schedule=schedule,
        arch=arch,
        gradients=gradients,
        one_pass=one_pass,
        padded=key_valid is not None,
        hopper=hopper,
    )
    if q.numel() == 0 or k.numel() == 0 or layout.indices.numel() == 0:
        return _nothing(q, v)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if plan.schedule == "hopper":
            from astbench_kernels.triton.hopper.function import hopper_attention  # not every triton has Gluon

            return hopper_attention(q, k, v, layout, plan, block_bias, scale)
        out, lse = _TritonAttention.apply(q, k, v, block_bias, layout, plan, scale, key_valid)
    return out, lse


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What rows without a single key get."""
    out = (q[..., :1] * 0).expand(*q.shape[:3], v.shape[-1])
    return out, torch.full(q.shape[:3], -torch.inf, device=q.device)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_bias: Tensor | None,
        layout: BlockLayout,
        plan: Plan,
        scale: float,
        key_valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k, v = (rows_contiguous(x) for x in (q, k, v))
        bias = None if block_bias is None else block_bias.detach().contiguous()
        valid = None if key_valid is None else key_valid.contiguous()
        out = torch.empty(*q.shape[:3], plan.value_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        inputs = _inputs(plan, layout, q, k, v, bias, valid, scale)
        if plan.schedule == "decode":  # make_plan sees to it that no backward pass follows
            _forward_decode(plan, layout, inputs, out, lse)
            return out, lse
        states = block_states(plan, valid, q.device)
        transposed = None
        if plan.schedule == "query_major":
            _forward_query_major(plan, layout, states, inputs, out, lse)
        else:
            transposed = transpose_lists(plan, layout, states, even=plan.key_major_even())
            _forward_key_major(plan, layout, transposed, inputs, out, lse)
        ctx.save_for_backward(q, k, v, bias, valid, out, lse, states)
        ctx.transposed, ctx.layout, ctx.plan, ctx.scale = transposed, layout, plan, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, valid, out, lse, states = ctx.saved_tensors
        plan, layout = ctx.plan, ctx.layout
        if d_out is None and d_lse is None:
            return (None,) * 8
        with torch.cuda.device_of(q):
            delta = _rowsums(plan, out, d_out, d_lse)
            d_out = rows_contiguous(torch.zeros_like(out) if d_out is None else d_out.to(q.dtype))
            transposed: TransposedLists | None = ctx.transposed
            even = plan.key_major_even(backward=True)
            # The two key-major tiles may differ in what they call full.
            if transposed is None or even != plan.key_major_even():
                transposed = transpose_lists(plan, layout, states, even=even)
            inputs = _inputs(plan, layout, q, k, v, bias, valid, ctx.scale).with_gradients(d_out, lse, delta, ctx.scale)
            d_q: Tensor | None
            if plan.adds_up_queries:
                d_q, d_k, d_v, d_bias = _backward_key_major(plan, transposed, inputs, both=True)
            else:
                _, d_k, d_v, _ = _backward_key_major(plan, transposed, inputs, both=False)
                d_q, d_bias = _backward_query_major(plan, layout, states, inputs)
        d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
        return d_q, d_k, d_v, d_bias, None, None, None, None


@dataclass(frozen=True)
class _Inputs:
    """What every attention kernel is given.

    Attributes:
        arguments: By the kernels' parameter names. Pointers that a kernel does not read are any tensor's.
        since: Of carried lists, for the kernels that take them.
        has_bias: Whether `bias` is read.
        has_valid: Whether `key_valid` is read.
    """

    arguments: _Arguments
    since: Tensor | None
    has_bias: bool
    has_valid: bool

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def carried(self) -> _Arguments:
        """What kernels that take carried lists are given besides."""
        return {"since": self["q"] if self.since is None else self.since}

    def with_gradients(self, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float) -> _Inputs:
        """What the backward kernels are given besides; `scale` is the caller's, in base e."""
        more = {"d_out": d_out, "lse": lse, "delta": delta, "softmax_scale": scale}
        more |= dict(zip(("stride_ob", "stride_oh", "stride_on"), d_out.stride(), strict=False))
        return replace(self, arguments=self.arguments | more)

    def constants(self, plan: Plan, tile: Tile) -> _Arguments:
        """What all kernels are compiled for."""
        return {
            "HEADS": plan.heads,
            "KV_HEADS": plan.kv_heads,
            "LISTS": plan.lists,
            "HEAD_GROUPS": plan.head_groups,
            "CAUSAL": plan.causal,
            "KEY_STRIDE": plan.key_stride,
            "HAS_BIAS": self.has_bias,
            "HAS_VALID": self.has_valid,
            "DIM": plan.head_dim,
            "BLOCK_DIM": padded_dim(plan.head_dim),
            "VALUE_DIM": plan.value_dim,
            "BLOCK_VALUE": padded_dim(plan.value_dim),
            "BLOCK_SIZE": plan.block_size,
            "GROUP": plan.query_group,
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "PRECISE": not plan.half,
        }


def _inputs(
    plan: Plan,
    layout: BlockLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    scale: float,
) -> _Inputs:
    arguments: _Arguments = {
        "q": q,
        "k": k,
        "v": v,
        "bias": q if bias is None else bias,
        "key_valid": k if valid is None else valid,
        "scale": scale * LOG2E.value,
        "groups": plan.groups,
        "width": plan.width,
        "first_group": plan.first_group,
        "query_offset": plan.query_offset,
        "query_length": plan.query_length,
        "key_length": plan.key_length,
    }
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments |= dict(zip((f"stride_{name}b", f"stride_{name}h", f"stride_{name}n"), x.stride(), strict=False))
    since = None if layout.since is None else layout.since.contiguous()
    return _Inputs(arguments, since, has_bias=bias is not None, has_valid=valid is not None)


def _query_major_grid(plan: Plan, tile: Tile) -> tuple[int, int]:
    """(tiles of a group, tiles of a head group)."""
    per_group = ceil_div(plan.rows_per_list, tile.rows)
    return per_group, per_group * plan.groups


def _forward_query_major(
    plan: Plan, layout: BlockLayout, states: Tensor, inputs: _Inputs, out: Tensor, lse: Tensor
) -> None:
    tile = plan.query_major_tile()
    lists = order_lists(plan, layout, states, even=plan.query_major_even())
    per_group, tiles = _query_major_grid(plan, tile)
    launch(
        query_major.forward,
        plan.batch * plan.head_groups * tiles,
        {**inputs.arguments, **inputs.carried, **vars(lists), "out": out, "lse": lse, "num_tiles": tiles},
        {**inputs.constants(plan, tile), "HAS_SINCE": inputs.since is not None}
        | {"PADDED": plan.padded_block, "TILES_PER_GROUP": per_group},
        tile,
    )


def _backward_query_major(
    plan: Plan, layout: BlockLayout, states: Tensor, inputs: _Inputs
) -> tuple[Tensor, Tensor | None]:
    tile = plan.query_major_tile(backward=True)
    lists = order_lists(plan, layout, states, even=plan.query_major_even(backward=True))
    per_group, tiles = _query_major_grid(plan, tile)
    q = inputs["q"]
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_bias = None
    if inputs.has_bias:
        shape = (plan.batch, plan.head_groups, plan.groups, per_group, plan.width)
        d_bias = torch.zeros(shape, dtype=torch.float32, device=q.device)
    launch(
        query_major.backward,
        plan.batch * plan.head_groups * tiles,
        {
            **inputs.arguments,
            **inputs.carried,
            **vars(lists),
            "d_q": d_q,
            "d_bias": q if d_bias is None else d_bias,
            "num_tiles": tiles,
        },
        {**inputs.constants(plan, tile), "HAS_SINCE": inputs.since is not None}
        | {"PADDED": plan.padded_block, "TILES_PER_GROUP": per_group},
        tile,
    )
    if d_bias is None:
        return d_q, None
    # Head groups that share a list are neighbours.
    shared = d_bias.sum(3).view(plan.batch, plan.lists, plan.head_groups // plan.lists, plan.groups, plan.width)
    return d_q, shared.sum(2)


def _forward_key_major(
    plan: Plan, layout: BlockLayout, lists: TransposedLists, inputs: _Inputs, out: Tensor, lse: Tensor
) -> None:
    tile = plan.key_major_tile()
    parts = ceil_div(plan.block_size, tile.keys)
    constants = inputs.constants(plan, tile)
    rows = min(plan.groups_per_chunk * plan.query_group, plan.query_length)
    shape = (plan.batch, plan.heads, rows, plan.width, parts)
    partial = torch.empty(*shape, plan.value_dim, dtype=out.dtype, device=out.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=out.device)
    merging = Tile(rows=16, keys=1, num_warps=4, num_stages=3)
    for chunk in range(plan.num_chunks):
        first = (plan.first_group + chunk * plan.groups_per_chunk) * plan.query_group - plan.query_offset
        start = max(0, first)
        stop = min(plan.query_length, first + plan.groups_per_chunk * plan.query_group)
        here = {"chunk_start": start, "chunk_rows": stop - start}
        partial_lse.fill_(-torch.inf)
        launch(
            key_major.forward,
            plan.batch * plan.head_groups * plan.num_blocks * parts,
            {**inputs.arguments, **here, **_transposed(plan, lists), "partial": partial, "partial_lse": partial_lse}
            | {"chunk": chunk, "num_tiles": plan.num_blocks * parts},
            constants,
            tile,
        )
        names = ("groups", "width", "first_group", "query_offset", "query_length")
        launch(
            key_major.merge,
            plan.batch * plan.heads * ceil_div(stop - start, merging.rows),
            {**here, **{name: inputs[name] for name in names}, "partial": partial, "partial_lse": partial_lse}
            | {"counts": layout.counts.contiguous(), "out": out, "lse": lse}
            | {"num_tiles": ceil_div(stop - start, merging.rows)},
            {name: constants[name] for name in ("HEADS", "LISTS", "VALUE_DIM", "BLOCK_VALUE", "GROUP")}
            | {"PARTS": parts, "ROWS": merging.rows},
            merging,
        )


def _forward_decode(plan: Plan, layout: BlockLayout, inputs: _Inputs, out: Tensor, lse: Tensor) -> None:
    tile, splits = plan.decode_tile(), plan.num_splits
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty(*lse.shape, splits, plan.value_dim, dtype=torch.float32, device=out.device)
        partial_lse = torch.empty(*lse.shape, splits, dtype=torch.float32, device=out.device)
    constants = inputs.constants(plan, tile)
    launch(
        decode.forward,
        plan.decode_tiles * splits,
        {**inputs.arguments, **inputs.carried, "indices": layout.indices.contiguous()}
        | {"counts": layout.counts.contiguous(), "out": partial, "lse": partial_lse, "splits": splits},
        {**constants, "HAS_SINCE": inputs.since is not None, "PADDED": plan.padded_block, "WHOLE": splits == 1}
        | {"TILES_PER_GROUP": ceil_div(plan.rows_per_group, tile.rows)},
        tile,
    )
    if splits == 1:
        return
    merging = Tile(rows=16, keys=1, num_warps=4, num_stages=3)
    launch(
        decode.merge,
        lse.numel(),
        {"partial": partial, "partial_lse": partial_lse, "out": out, "lse": lse, "splits": splits},
        {name: constants[name] for name in ("VALUE_DIM", "BLOCK_VALUE")}
        | {"MAX_SPLITS": MAX_SPLITS, "ROWS": merging.rows},
        merging,
    )


def _backward_key_major(
    plan: Plan, lists: TransposedLists, inputs: _Inputs, *, both: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """(d_q, d_k, d_v, d_bias); the first and the last only with `both`."""
    tile = plan.key_major_tile(backward=True)
    tiles = plan.num_blocks * ceil_div(plan.block_size, tile.keys)
    q, k, v, bias = (inputs[name] for name in ("q", "k", "v", "bias"))
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    d_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if both else None
    d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=q.device) if both and inputs.has_bias else None
    launch(
        key_major.backward,
        plan.batch * plan.kv_heads * tiles,
        {**inputs.arguments, **inputs.carried, **_transposed(plan, lists), "d_k": d_k, "d_v": d_v, "num_tiles": tiles}
        | {"d_q": q if d_q is None else d_q, "d_bias": q if d_bias is None else d_bias},
        {**inputs.constants(plan, tile), "HAS_SINCE": inputs.since is not None, "ALL": both},
        tile,
    )
    return None if d_q is None else d_q.to(q.dtype), d_k, d_v, d_bias


def _transposed(plan: Plan, lists: TransposedLists) -> _Arguments:
    return {
        "entries": lists.entries,
        "starts": lists.starts,
        "turns": lists.turns,
        "num_chunks": lists.num_chunks,
        "num_blocks": plan.num_blocks,
    }


def _rowsums(plan: Plan, out: Tensor, d_out: Tensor | None, d_lse: Tensor | None) -> Tensor:
    """float32 `(batch, heads, query_length)`: rowsum(out * d_out) - d_lse."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    out_grad = out if d_out is None else rows_contiguous(d_out)
    lse_grad = delta if d_lse is None else d_lse
    strides = zip(("stride_ob", "stride_oh", "stride_on"), out_grad.stride(), strict=False)
    tile = Tile(rows=16, keys=1, num_warps=4, num_stages=1)
    launch(
        key_major.rowsums,
        ceil_div(delta.numel(), tile.rows),
        {"out": out, "d_out": out_grad, "d_lse": lse_grad, "delta": delta, **dict(strides)}
        | dict(zip(("stride_lb", "stride_lh", "stride_ln"), lse_grad.stride(), strict=True))
        | {"rows": delta.numel(), "heads": plan.heads, "query_length": plan.query_length},
        {"HAS_OUT": d_out is not None, "HAS_LSE": d_lse is not None, "VALUE_DIM": plan.value_dim}
        | {"BLOCK_VALUE": padded_dim(plan.value_dim), "ROWS": tile.rows},
        tile,
    )
    return delta
