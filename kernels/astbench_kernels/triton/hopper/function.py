"""The Hopper kernels as one differentiable function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from astbench_kernels.dispatch.hopper import tile_rows
from astbench_kernels.layout import BlockLayout
from astbench_kernels.triton.attention.lists import OrderedLists, block_states, order_lists, transpose_lists
from astbench_kernels.triton.hopper.backward_kv import backward_kv
from astbench_kernels.triton.hopper.backward_q import backward_q
from astbench_kernels.triton.hopper.descriptors import (
    addressable,
    floats_descriptor,
    gluon_dtype,
    keys_descriptor,
    rows_descriptor,
)
from astbench_kernels.triton.hopper.forward import forward
from astbench_kernels.triton.hopper.rowsums import rowsums
from astbench_kernels.triton.launch import launch, launch_gluon
from astbench_kernels.triton.plan import Plan, Tile, padded_dim
from astbench_kernels.triton.tiles import LOG2E

_Arguments = dict[str, Any]


@dataclass(frozen=True)
class _Config:
    """How a kernel is run; what was fastest of what the prototype tried.

    Attributes:
        consumers: Warpgroups of 64 rows.
        keys: Keys of a step.
        stages: Steps of keys and values in shared memory.
    """

    consumers: int
    keys: int
    stages: int

    @property
    def alone(self) -> bool:
        """One program a multiprocessor, which stays; with one warpgroup two share it, each for one tile."""
        return self.consumers == 2

    @property
    def most_registers(self) -> int | None:
        """Of a thread, so that two programs fit."""
        return None if self.alone else 128

    def tile(self) -> Tile:
        """As launches are written down; the producer's warps come with the kernel."""
        return Tile(rows=64 * self.consumers, keys=self.keys, num_warps=4, num_stages=self.stages)

    def programs(self, plan: Plan, num_tiles: int) -> int:
        """Size of the grid."""
        return min(num_tiles, plan.processors) if self.alone else num_tiles


def _dim(plan: Plan) -> int:
    """The head size as the kernels hold it: one or two tiles of 64 columns."""
    return 64 if plan.head_dim <= 64 else 128


def _forward_config(plan: Plan) -> _Config:
    two = tile_rows(plan.rows_per_list) == 128
    return _Config(2 if two else 1, 128 if two else 64, 3 * 128 // _dim(plan))


def _q_config(plan: Plan) -> _Config:
    two = tile_rows(plan.rows_per_list) == 128
    return _Config(2 if two else 1, 64, (5 if two else 2) * 128 // _dim(plan))


def _kv_config(plan: Plan) -> _Config:
    return _Config(1, 64, 2 * 128 // _dim(plan))


def hopper_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, plan: Plan, block_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`; `plan` has the schedule "hopper".

    Cost: as the query-major schedule's; inputs that TMA cannot address (strides that are no multiples of 16 bytes, or
    0) are copied.
    """
    narrow = {name: getattr(layout, name).to(torch.int32) for name in ("indices", "counts")}
    since = None if layout.since is None else layout.since.to(torch.int32)
    out, lse = _HopperAttention.apply(q, k, v, block_bias, replace(layout, **narrow, since=since), plan, scale)
    return out, lse


class _HopperAttention(torch.autograd.Function):
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
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k, v = (addressable(x) for x in (q, k, v))
        bias = None if block_bias is None else block_bias.detach().contiguous()
        states = block_states(plan, None, q.device)
        lists = order_lists(plan, layout, states, even=True)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _forward(plan, layout, lists, (q, k, v), bias, out, lse, scale)
        ctx.save_for_backward(q, k, v, bias, out, lse, states)
        ctx.lists, ctx.layout, ctx.plan, ctx.scale = lists, layout, plan, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse, states = ctx.saved_tensors
        plan, layout = ctx.plan, ctx.layout
        if d_out is None and d_lse is None:
            return (None,) * 7
        with torch.cuda.device_of(q):
            d_out = addressable(torch.zeros_like(out) if d_out is None else d_out.to(q.dtype))
            lse2, delta = _rowsums(plan, out, d_out, lse, d_lse)
            rows = (q, k, v, d_out, lse2, delta)
            d_k, d_v = _backward_kv(plan, layout, states, rows, bias, ctx.scale)
            d_q, d_bias = _backward_q(plan, layout, ctx.lists, rows, bias, ctx.scale)
        return d_q, d_k, d_v, None if bias is None or d_bias is None else d_bias.to(bias.dtype), None, None, None


def _sizes(plan: Plan) -> _Arguments:
    return {
        "width": plan.width,
        "groups": plan.groups,
        "first_group": plan.first_group,
        "query_offset": plan.query_offset,
        "key_length": plan.key_length,
    }


def _constants(plan: Plan, layout: BlockLayout, bias: Tensor | None, config: _Config, dtype: torch.dtype) -> _Arguments:
    return {
        "LISTS": plan.lists,
        "HEAD_GROUPS": plan.head_groups,
        "KV_HEADS": plan.kv_heads,
        "EACH": plan.heads_per_head_group,
        "GROUP": plan.query_group,
        "BLOCK": plan.block_size,
        "STAGES": config.stages,
        "DIM": _dim(plan),
        "REAL_DIM": plan.head_dim,
        "CAUSAL": plan.causal,
        "KEY_STRIDE": plan.key_stride,
        "HAS_BIAS": bias is not None,
        "HAS_SINCE": layout.since is not None,
        "DTYPE": gluon_dtype(dtype),
    }


def _query_major(plan: Plan, config: _Config) -> tuple[_Arguments, _Arguments, int]:
    """(arguments, constants, tiles) of the two kernels that walk over lists."""
    tiles = plan.rows_per_list // (64 * config.consumers)
    num_tiles = plan.batch * plan.head_groups * plan.groups * tiles
    constants = {"HEADS": plan.heads, "TILES": tiles, "CONSUMERS": config.consumers}
    # Registers of a consumer's thread when the program is alone; the compiler splits 128 a thread by itself.
    constants |= {"IN_REGISTERS": not config.alone, "REGISTERS": 240}
    return {"num_tiles": num_tiles, "query_length": plan.query_length, **_sizes(plan)}, constants, num_tiles


def _listed(layout: BlockLayout, bias: Tensor | None) -> _Arguments:
    """What is aligned with the caller's lists. Pointers that a kernel does not read are any tensor's."""
    since = layout.indices if layout.since is None else layout.since
    return {"bias": layout.indices if bias is None else bias, "since": since.contiguous()}


def _forward(
    plan: Plan,
    layout: BlockLayout,
    lists: OrderedLists,
    inputs: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    config = _forward_config(plan)
    q, k, v = inputs
    box = min(plan.block_size, config.keys)
    sizes, constants, num_tiles = _query_major(plan, config)
    launch_gluon(
        forward,
        config.programs(plan, num_tiles),
        {"q_desc": rows_descriptor(q, plan.heads_per_head_group), "k_desc": keys_descriptor(k, box)}
        | {"v_desc": keys_descriptor(v, box), **vars(lists), **_listed(layout, bias), **sizes}
        | {"out": out, "lse": lse, "scale": scale * LOG2E.value},
        {**_constants(plan, layout, bias, config, q.dtype), **constants, "KEYS": config.keys},
        config.tile(),
        config.most_registers,
    )


def _rowsums(plan: Plan, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log-sum-exp in base 2, delta), float32 `(batch, head groups, rows of all groups)`."""
    length = plan.groups * plan.rows_per_list
    delta = torch.empty(plan.batch, plan.head_groups, length, dtype=torch.float32, device=out.device)
    lse2 = torch.empty_like(delta)
    tile = Tile(rows=64, keys=1, num_warps=4, num_stages=3)
    arguments: _Arguments = {
        "out": out,
        "d_out": d_out,
        "lse": lse,
        "d_lse": lse if d_lse is None else d_lse.contiguous(),
    }
    arguments |= dict(zip(("stride_ob", "stride_oh", "stride_on"), d_out.stride(), strict=False))
    arguments |= {"first_group": plan.first_group, "query_offset": plan.query_offset}
    launch(
        rowsums,
        plan.batch * plan.head_groups * (length // tile.rows),
        {**arguments, "delta": delta, "lse2": lse2, "length": length, "query_length": plan.query_length},
        {"HEADS": plan.heads, "HEAD_GROUPS": plan.head_groups, "GROUP": plan.query_group, "HAS_LSE": d_lse is not None}
        | {"DIM": plan.head_dim, "BLOCK_DIM": padded_dim(plan.head_dim), "ROWS": tile.rows},
        tile,
    )
    return lse2, delta


def _backward_q(
    plan: Plan, layout: BlockLayout, lists: OrderedLists, rows: tuple[Tensor, ...], bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    config = _q_config(plan)
    q, k, v, d_out, lse2, delta = rows
    each, box = plan.heads_per_head_group, min(plan.block_size, 64)
    sizes, constants, num_tiles = _query_major(plan, config)
    d_q, d_bias = torch.empty(q.shape, dtype=q.dtype, device=q.device), None
    if bias is not None:
        shape = (plan.batch, plan.head_groups, plan.groups, plan.rows_per_list // 64, plan.width)
        d_bias = torch.zeros(shape, dtype=torch.float32, device=q.device)
    launch_gluon(
        backward_q,
        config.programs(plan, num_tiles),
        {"q_desc": rows_descriptor(q, each), "o_desc": rows_descriptor(d_out, each)}
        | {"k_desc": keys_descriptor(k, box), "v_desc": keys_descriptor(v, box), **vars(lists)}
        | {**_listed(layout, bias), **sizes, "lse2": lse2, "delta": delta, "d_q": d_q, "length": lse2.shape[-1]}
        | {"d_bias": delta if d_bias is None else d_bias, "scale": scale * LOG2E.value, "softmax_scale": scale},
        {**_constants(plan, layout, bias, config, q.dtype), **constants},
        config.tile(),
        config.most_registers,
    )
    if d_bias is None:
        return d_q, None
    # Head groups that share a list are neighbours.
    shared = d_bias.sum(3).view(plan.batch, plan.lists, plan.head_groups // plan.lists, plan.groups, plan.width)
    return d_q, shared.sum(2)


def _backward_kv(
    plan: Plan, layout: BlockLayout, states: Tensor, rows: tuple[Tensor, ...], bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    config = _kv_config(plan)
    lists = transpose_lists(plan, layout, states, even=True)
    q, k, v, d_out, lse2, delta = rows
    each, box = plan.heads_per_head_group, min(plan.block_size, 64)
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    launch_gluon(
        backward_kv,
        plan.batch * plan.kv_heads * plan.num_blocks * max(1, plan.block_size // 64),
        {"q_desc": rows_descriptor(q, each), "o_desc": rows_descriptor(d_out, each)}
        | {"k_desc": keys_descriptor(k, box), "v_desc": keys_descriptor(v, box)}
        | {"l_desc": floats_descriptor(lse2), "t_desc": floats_descriptor(delta), **_listed(layout, bias)}
        | {"entries": lists.entries, "starts": lists.starts, "turns": lists.turns, "num_blocks": plan.num_blocks}
        | {**_sizes(plan), "d_k": d_k, "d_v": d_v, "scale": scale * LOG2E.value, "softmax_scale": scale},
        _constants(plan, layout, bias, config, q.dtype),
        config.tile(),
        config.most_registers,
    )
    return d_k, d_v
