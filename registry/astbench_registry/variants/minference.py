"""MInference's vertical-slash attention (Jiang et al. 2024, arXiv 2407.02490, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from astbench_kernels.layout import ceil_div
from astbench_registry.block_selection import BlockSelectingAttention, BlockSelector, Call, Selection, block_scores
from astbench_registry.configs.minference import MInferenceConfig
from astbench_registry.mask import AttentionMask


class VerticalSlashSelector(BlockSelector):
    """The most that columns and diagonals can keep. For the declared cost; nothing is cut."""

    config: MInferenceConfig

    def budget(self, visible_blocks: Tensor, density: float | None = None) -> Tensor:
        """See the base class: every column and diagonal through blocks of its own."""
        config = self.config
        through = ceil_div(config.query_group, config.block_size) + 1  # blocks of one diagonal in a group's rows
        return visible_blocks.clamp(max=config.vertical + config.slash * through)


class MInferenceAttention(BlockSelectingAttention):
    """Columns and diagonals of the attention matrix, estimated per head from its last rows; no parameters.

        A = softmax(Q[-last_queries:] K^T / sqrt(d) + causal mask)                        (algorithm 2)
        vertical = the keys j with the largest sum of A over its rows,
        slash = the distances i - j with the largest sum of A along that diagonal

    and every query sees the keys in `vertical`, and those at the distances in `slash`. For long prompts, before the
    first token is written: the prompt's end chooses for all of it, so this is not strictly causal and cannot decode
    (the paper decodes densely).

    Differences from the paper:

    * All is done in blocks of `block_size` keys for `query_group` rows. The paper's kernel takes diagonals in blocks of
      64 x 64 and columns one key at a time; here a column keeps its whole block. So at the same numbers more is seen
      here, and a column costs `block_size` times as much.
    * Every head has this pattern. The paper gives each head the best of three in a search on a sample before use, and
      most heads get this one.
    * The first columns and the shortest distances are always kept, as in its published code (30 and 100).
    * Padding is not in the paper: the last real queries of each sequence decide.
    """

    config: MInferenceConfig
    selector_class = VerticalSlashSelector

    @torch.no_grad()
    def scores(self, call: Call, selection: Selection) -> Tensor:
        """1 for blocks that a column or a diagonal runs through, else 0. Time O(M last_queries + groups x blocks)."""
        weights, position = self._last_rows(call)
        config, length = self.config, call.k.shape[2]
        vertical = weights.sum(2)
        vertical[..., : config.first] = torch.inf
        # Along a diagonal: at distance n, a row at position i has the key i - n.
        key = position[..., None] - torch.arange(length, device=position.device)  # (batch, rows, distances)
        slash = weights.gather(3, key.clamp(min=0)[:, None].expand_as(weights))
        slash = slash.masked_fill((key < 0)[:, None], 0.0).sum(2)
        slash[..., : config.recent] = torch.inf
        columns = _largest(vertical, config.vertical)
        columns = pad(columns, (0, selection.num_blocks * selection.block_size - length))
        through = columns.unflatten(-1, (selection.num_blocks, -1)).any(-1)[:, :, None, :]
        return (through | self._crossed(_largest(slash, config.slash), selection)).to(weights.dtype)

    def choose(self, scores: Tensor, call: Call, selection: Selection) -> Tensor:
        """All blocks that are run through, and each group's own."""
        return ((scores > 0) & selection.visible) | selection.always_kept

    def _last_rows(self, call: Call) -> tuple[Tensor, Tensor]:
        """Dense weights of each sequence's last real queries, `(batch, num_heads, rows, keys)`; their positions."""
        q, k, mask, wide = call.q, call.k, call.mask, call.compute_dtype
        batch, length = q.shape[0], q.shape[2]
        rows = min(self.config.last_queries, length)
        valid = mask.valid_queries(length)
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        # Sorting False before True, stably, leaves the last real queries at the end, in their order.
        index = torch.sort(valid.to(torch.uint8), dim=1, stable=True).indices[:, length - rows :]
        real = valid.gather(1, index)
        logits = block_scores(q.take_along_dim(index[:, None, :, None], 2).to(wide), k.to(wide)) * call.scale
        position = index + mask.query_offset
        hidden = torch.arange(k.shape[2], device=q.device) > position[..., None]
        if mask.key_valid is not None:
            hidden = hidden | ~mask.key_valid[:, None, :]
        weights = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return weights.masked_fill(~real[:, None, :, None], 0.0), position

    def _crossed(self, slash: Tensor, selection: Selection) -> Tensor:
        """Bool `(batch, num_heads, groups, blocks)`: blocks with a pair at one of the distances in `slash`."""
        size, length = selection.block_size, slash.shape[-1]
        before = pad(slash.cumsum(-1), (1, 0))  # entry n: kept distances below n
        start = torch.arange(selection.num_blocks, device=slash.device) * size
        nearest = selection.first[:, None] - (start + size - 1)
        farthest = selection.first[:, None] + selection.query_group - 1 - start
        return before[..., (farthest + 1).clamp(0, length)] > before[..., nearest.clamp(0, length)]

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """The most that can be kept, which depends on the input, and the estimate's one matmul."""
        rows = min(self.config.last_queries, query_length)
        estimate = 2 * batch * self.shape.num_heads * rows * key_length * self.shape.head_dim
        kept = super().flops(batch, query_length, key_length, mask)
        return None if kept is None else kept + estimate


def _largest(x: Tensor, number: int) -> Tensor:
    """Bool, as `x`: the `number` largest of the last axis, those without any mass left out."""
    best = x.topk(min(number, x.shape[-1]), -1).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, best, True) & (x > 0)
