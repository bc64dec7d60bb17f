"""The predictor: features of blocks and of query groups, and the two factors of their score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from astbench_kernels.triton import pool_blocks
from astbench_registry.block_selection import BlockFeatures, BlockSummaries, Call, FactoredBlockSelection, Grid
from astbench_registry.block_selection.pooling import extremes_of_blocks, mean_of_blocks, real_in_blocks
from astbench_registry.configs.adaptive_sparse import ASTConfig
from astbench_registry.interface import AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.widening import widened
from astbench_registry.variants.ast.index import TokenIndex

T = TypeVar("T")

NO_TOKEN = -1e4
"""Logit of what is no token: its exponential is 0, where -inf would make NaN of blocks that are all padding."""


class LearnedBlockScores(FactoredBlockSelection):
    """The scores of :class:`AdaptiveSparseAttention`, whose docstring has the equations, and their parameters."""

    config: ASTConfig

    def __init__(self, config: ASTConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        dim, rank = shape.head_dim, config.rank
        self.gain = nn.Parameter(torch.zeros(shape.num_heads))
        self.index = TokenIndex(shape, config.index_dim) if config.index_dim else None
        if self.index is None:
            self.query_weight = nn.Parameter(torch.empty(shape.num_heads, 2 * dim + 1, rank))
            self.key_weight = nn.Parameter(torch.zeros(shape.num_kv_heads, 4 * dim, rank))
            nn.init.normal_(self.query_weight)
        self.pattern_weight = nn.Parameter(torch.zeros(shape.num_heads, config.patterns)) if config.patterns else None

    @property
    def columns_per_block(self) -> int:
        """See the base class: one a token with an index of them, else one a part."""
        return self.config.sub_blocks if self.index is None else self.config.block_size

    def observe(self, q: Tensor, k: Tensor, mask: AttentionMask) -> None:
        """See the base class: for the index of tokens."""
        if self.index is not None:
            self.index.observe(q, k, mask.valid_queries(q.shape[2]), mask.key_valid)

    def start(self) -> bool:
        """See the base class: the index's projections."""
        return self.index is not None and self.index.start()

    def forget(self) -> None:
        """See the base class."""
        if self.index is not None:
            self.index.forget()

    def block_features(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """See the base class: the rows that are scored, and for the global context mean values and sizes."""
        return self.features_with_gradient(call.detached() if self.detaches() else call, grid, fused=fused)

    def factors(self, call: Call, features: BlockFeatures, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the base class. Time O(N + M / block_size) for the features."""
        return self.factors_with_gradient(call.detached() if self.detaches() else call, features, grid)

    def detaches(self) -> bool:
        """Whether what teaches the predictor stops at its inputs."""
        return self.config.detach and self.config.estimator != "soft"

    def features_with_gradient(self, call: Call, grid: Grid, *, fused: bool) -> BlockFeatures:
        """:meth:`block_features`, with a gradient to keys and values whatever `detach` says."""
        k, v, mask, compute = call.k, call.v, call.mask, call.compute_dtype
        if self.index is not None:
            return self._index_features(call, grid)
        if fused:
            mean_key, max_key, min_key, mean_value, counts = pool_blocks(k, v, mask.key_valid, grid.block_size)
        else:
            mean_key, mean_value = mean_of_blocks(k, mask, grid), mean_of_blocks(v, mask, grid)
            max_key, min_key = extremes_of_blocks(k, mask, grid)
            counts = real_in_blocks(k, mask, grid).sum(-1)
        # Of length 1, so that one learning rate serves every layer of every backbone: with features of size 1, a
        # step of Adam moved scores by several units, and the choice flickered.
        local = _unit(torch.cat([mean_key, max_key, min_key, mean_value], -1))
        key_side = [mean_key, torch.matmul(local, widened(self.key_weight, compute))]
        parts = self.config.sub_blocks
        if parts > 1:
            fine = replace(grid, block_size=grid.block_size // parts, num_blocks=grid.num_blocks * parts)
            size = real_in_blocks(k, mask, fine).sum(-1)
            weight = size.clamp(min=1).to(compute).log().masked_fill(size == 0, NO_TOKEN)
            key_side = [mean_of_blocks(k, mask, fine), key_side[1].repeat_interleave(parts, 2)]
            key_side.append(weight[:, None, :, None].expand(*k.shape[:2], -1, -1))
        return BlockFeatures(torch.cat(key_side, -1), mean_value, counts.to(compute)[:, None, :, None])

    def _index_features(self, call: Call, grid: Grid) -> BlockFeatures:
        """One row a token: its index key, and a column that takes what is no token out of the sum."""
        assert self.index is not None
        compute, length = call.compute_dtype, grid.num_blocks * grid.block_size
        real = real_in_blocks(call.k, call.mask, grid)
        keys = pad(self.index.keys(call.k, compute), (0, 0, 0, length - call.k.shape[2]))
        weight = torch.where(real.flatten(1), 0.0, NO_TOKEN).to(compute)
        keys = torch.cat([keys, weight[:, None, :, None].expand(*keys.shape[:3], 1)], -1)
        if not self.config.rest:
            return BlockFeatures(keys)
        return BlockFeatures(keys, mean_of_blocks(call.v, call.mask, grid), real.sum(-1).to(compute)[:, None, :, None])

    def factors_with_gradient(self, call: Call, features: BlockFeatures, grid: Grid) -> tuple[Tensor, Tensor]:
        """:meth:`factors`, with a gradient to the queries whatever `detach` says."""
        compute, columns = call.compute_dtype, features.key
        group_query = self.group_query(call, grid)
        gain = self._once(call, "gain", lambda: call.scale * widened(self.gain, compute).exp()[:, None, None])
        if self.index is not None:
            rows = [self.index.queries(group_query, compute) * gain]
            rows.append(torch.ones_like(rows[0][..., :1]))
            return self._with_patterns(call, rows, columns, grid)
        rows = [group_query * gain, self._learned_rows(group_query, features, call, grid)]
        if self.config.sub_blocks > 1:
            rows.append(torch.ones_like(rows[0][..., :1]))
        return self._with_patterns(call, rows, columns, grid)

    def _learned_rows(self, query: Tensor, features: BlockFeatures, call: Call, grid: Grid) -> Tensor:
        """`W_u [unit([q ; c]) ; 1] / sqrt(rank)`; what is c's is computed once for all groups that know the same."""
        dim = 2 * query.shape[-1]

        def weights() -> Sequence[Tensor]:
            weight = widened(self.query_weight, query.dtype) * self.config.rank**-0.5
            return weight.split([dim // 2, dim // 2, 1], 1)

        of_query, of_context, constant = self._once(call, "weights", weights)

        def of_known() -> tuple[Tensor, Tensor]:
            mean, known = _means_of_known(features, call.mask, grid)
            each = self.shape.num_heads // self.shape.num_kv_heads
            context = torch.matmul(mean.repeat_interleave(each, 1), of_context)
            size = mean.square().sum(-1, keepdim=True).repeat_interleave(each, 1)
            return (context, size) if known is None else (context[:, :, known], size[:, :, known])

        context, size = self._once(call, "context", of_known)
        # As rms_norm has it: its epsilon is added to the mean of the squares.
        eps = torch.finfo(query.dtype).eps
        length = (torch.linalg.vector_norm(query, dim=-1, keepdim=True).square() + size + dim * eps).rsqrt()
        return (torch.matmul(query, of_query) + context) * length + constant

    def _once(self, call: Call, name: str, make: Callable[[], T]) -> T:
        """`make()`; in a step of decoding only where completed blocks are not those of the last one."""
        kept = call.context.summaries
        if call.q.shape[2] > 1 or not isinstance(kept, BlockSummaries) or torch.is_grad_enabled():
            return make()
        blocks = call.mask.query_offset // self.config.block_size
        return kept.once(name, (blocks, call.compute_dtype, call.scale), make)

    def _with_patterns(self, call: Call, rows: list[Tensor], columns: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Both factors, patterns of the distance added."""
        if self.pattern_weight is not None:
            waves, places = _distance_patterns(widened(self.pattern_weight, call.compute_dtype), grid)
            rows = [*rows, waves.expand(call.q.shape[0], -1, -1, -1)]
            places = places.repeat_interleave(self.columns_per_block, 0)
            columns = torch.cat([columns, places.expand(*columns.shape[:2], -1, -1)], -1)
        return torch.cat(rows, -1), columns

    def global_context(self, features: BlockFeatures, mask: AttentionMask, grid: Grid) -> Tensor:
        """`(batch, num_heads, groups, value_dim)`: mean of the values that each group may know of."""
        mean, known = _means_of_known(features, mask, grid)
        mean = mean.expand(-1, -1, grid.num_groups, -1) if known is None else mean[:, :, known]
        return mean.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 1)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero, with finite gradients."""
    return rms_norm(x, x.shape[-1:]) * x.shape[-1] ** -0.5


def _distance_patterns(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Both sides of `sum_p weight_p cos(2 pi (i - j) / period_p)`, i and j in blocks.

    `(num_heads, groups, 2 patterns)` and `(blocks, 2 patterns)`: as cos(a - b) = cos a cos b + sin a sin b, patterns
    cost a few more columns of the score's product, and the kernel that chooses needs not know of them.
    """
    periods = 4.0 * 2.0 ** torch.arange(weight.shape[-1], device=weight.device, dtype=torch.float64)

    def waves(position: Tensor) -> tuple[Tensor, Tensor]:
        angle = 2 * torch.pi * position.double()[:, None] / periods
        return angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)

    cos, sin = waves(grid.first / grid.block_size)
    weight = weight[:, None]
    columns = torch.cat(waves(torch.arange(grid.num_blocks, device=weight.device)), -1)
    return torch.cat([weight * cos, weight * sin], -1), columns


def _means_of_known(features: BlockFeatures, mask: AttentionMask, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Means of the values that a group may know of, `(batch, kv_heads, n, d)`, and int64 `(groups,)` which is whose.

    None for one mean that is everybody's.
    """
    mean_value, counts = features.mean_value, features.num_tokens
    assert mean_value is not None and counts is not None
    if not mask.causal or grid.num_groups == 1:  # while decoding one sum costs far less than running sums
        known = min(mask.query_offset // grid.block_size, grid.num_blocks) if mask.causal else grid.num_blocks
        counts, mean_value = counts[:, :, :known], mean_value[:, :, :known]
        return torch.matmul(counts.transpose(2, 3), mean_value) / counts.sum(2, keepdim=True).clamp(min=1), None
    total = (mean_value * counts).cumsum(2)
    mean = pad(total / counts.cumsum(2).clamp(min=1), (0, 0, 1, 0))  # entry n: over the first n blocks
    return mean, (grid.first // grid.block_size).clamp(max=grid.num_blocks)
