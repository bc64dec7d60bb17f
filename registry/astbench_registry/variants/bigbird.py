"""BigBird: window, global and random blocks (Zaheer et al. 2020, arXiv 2007.14062), a layout fixed in advance."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_kernels import BlockLayout, block_sparse_attention, choose_backend, select_blocks, what_runs
from astbench_kernels.layout import ceil_div
from astbench_registry.block_selection.pooling import valid_in_blocks
from astbench_registry.configs.bigbird import BigBirdConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionStats, ExplicitWeights
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.explicit import listed_rows, softmax_rows
from astbench_registry.toolbox.randomness import hashed_uniform


class BigBirdAttention(Attention):
    """Query block i is softmax(q_i K_S(i)^T) V_S(i) over a set S(i) of key blocks, fixed in advance.

    S(i) holds

    * the window, |i - j| <= window_blocks;
    * the global blocks: the first and the last of the sequence, and those that hold a token named by the task;
    * `num_random_blocks` of the others, different for every query block, head and layer.

    Global query blocks see every block. This is the paper's internal construction (ITC): global tokens are
    some of the sequence's own. Blocks start at a sequence's first real token.

    Differs from the paper:

    * First and last are counted among the blocks that hold a real token, in each sequence by itself, so that
      padding behind it changes nothing; the authors' code takes the last block of the padded tensor.
    * Random blocks are drawn among those that hold a real token and are not seen anyway. They are a hash of
      (seed, layer, head, query block, key block), the same in training and evaluation; the authors' code
      draws them from numpy's global generator.
    * No extra global tokens in front of the sequence (the paper's ETC).

    The attention is linear in N; the layout is made from a table of blocks against blocks for each head, which
    at 16,384 tokens and 32 a block holds 512 x 512 numbers.
    """

    config: BigBirdConfig
    block_sparse = True

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """See the base class. Time O(N x kept keys), and O((N / block_size)^2) for the layout."""
        context = context or AttentionContext()
        layout = self.layout(q.shape[0], q.shape[2], q.device, mask, context.global_tokens)
        backend = choose_backend(self.config.backend, q.device, dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1]))
        out, _ = block_sparse_attention(
            mask.real_queries(q), k, v, layout, scale=scale, key_valid=mask.key_valid, backend=backend
        )
        stats = None
        if context.collect_stats:
            attended = layout.attended_pairs(causal=False, key_valid=mask.key_valid)
            ran = what_runs(backend, q, k, v, layout, causal=False, key_valid=mask.key_valid)
            stats = AttentionStats(attended, mask.visible_pairs(q, k), ran, layout)
        return AttentionOutput(out, stats=stats)

    def explicit_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> ExplicitWeights:
        """See the base class."""
        context = context or AttentionContext()
        layout = self.layout(q.shape[0], q.shape[2], q.device, mask, context.global_tokens)
        stats = None
        if context.collect_stats:
            attended = layout.attended_pairs(causal=False, key_valid=mask.key_valid)
            stats = AttentionStats(attended, mask.visible_pairs(q, k), "torch", layout)
        return ExplicitWeights(softmax_rows(q, k, mask, scale, listed_rows(layout, q.shape[1])), stats)

    def layout(
        self, batch: int, length: int, device: torch.device, mask: AttentionMask, named: Tensor | None = None
    ) -> BlockLayout:
        """The blocks that each query block sees, one list per sequence and head.

        Args:
            batch: Sequences.
            length: Tokens in each, padding included.
            device: Where the lists go.
            mask: For its padding.
            named: Bool `(batch, length)`: tokens whose blocks are global too; None for none.
        """
        size = self.config.block_size
        number = torch.arange(ceil_div(length, size), device=device)
        real = torch.ones(1, len(number), dtype=torch.bool, device=device)  # (batch or 1, blocks)
        if mask.key_valid is not None:
            real = valid_in_blocks(mask.key_valid, len(number), size).any(-1)
        chosen = self._global_blocks(real)
        if named is not None:
            if named.shape != (batch, length):
                raise ValueError(f"global_tokens must be {(batch, length)}, got {tuple(named.shape)}")
            named = named if mask.key_valid is None else named & mask.key_valid
            chosen = chosen | valid_in_blocks(named, len(number), size).any(-1)
        near = (number[:, None] - number).abs() <= self.config.window_blocks
        seen = near | chosen[:, :, None] | chosen[:, None, :]  # (batch or 1, query blocks, key blocks)
        forced = (seen & real[:, None, :])[:, None]
        seed = self.config.seed * 1_000_003 + self.shape.layer_index
        heads = torch.arange(self.shape.num_heads, device=device)
        scores = hashed_uniform(seed, heads[:, None, None], number[:, None], number)
        keep = select_blocks(
            scores.expand(len(forced), -1, -1, -1),
            always_kept=forced,
            candidates=real[:, None, None, :],
            budget=forced.sum(-1) + self.config.num_random_blocks,
        )
        return BlockLayout.from_mask(
            keep.expand(batch, -1, -1, -1),
            block_size=size,
            query_group=size,
            query_length=length,
            key_length=length,
        )

    def _global_blocks(self, real: Tensor) -> Tensor:
        """Bool, as `real` `(batch or 1, blocks)`: the first and the last of the blocks that hold a real token."""
        rank = real.cumsum(1)
        left = rank[:, -1:] - rank  # how many of them come after this one
        return real & ((rank <= self.config.first_blocks) | (left < self.config.last_blocks))

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Two matmuls over the pairs that the lists name, when no token is padding and none is named."""
        layout = self.layout(batch, query_length, torch.device("cpu"), AttentionMask())
        pairs = int(layout.attended_pairs(causal=False).sum()) * self.shape.num_heads // layout.indices.shape[1]
        return 4 * pairs * self.shape.head_dim
