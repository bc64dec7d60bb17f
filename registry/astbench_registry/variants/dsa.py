"""DeepSeek sparse attention: tokens by a lightning indexer (DeepSeek-AI 2025, DeepSeek-V3.2-Exp)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from astbench_kernels import block_sparse_attention, choose_backend, what_runs
from astbench_registry.block_selection import BlockSelectingAttention, Selection, block_scores
from astbench_registry.block_selection.dense_layers import attend_densely
from astbench_registry.block_selection.dense_weights import dense_weights, rows_at_a_time
from astbench_registry.configs.dsa import DSAConfig
from astbench_registry.interface import AttentionContext, AttentionOutput, AttentionShape, AttentionStats
from astbench_registry.mask import AttentionMask


class DeepSeekSparseAttention(BlockSelectingAttention):
    """Each token attends to the `top_k` tokens of largest index score, all heads to the same ones.

        I_ts = sum_j w_tj relu(q_tj . k_s),   q_tj, w_tj, k_s linear in the layer's input h_t, h_s          (eq. 1)
        u_t = Attn(h_t, {c_s: I_ts among the top k of I_t})                                                 (eq. 2)
        loss = sum_t KL(p_t || softmax(I_t)),   p_t = dense attention, summed over heads, divided by its sum (eq. 3)

    with index queries j = 1 .. `index_heads` and one index key per token. While training, the layer is dense attention
    and the loss the only one that reaches the indexer, whose input is detached: the paper's dense warm-up. Train it on
    a dense model with --optim.train=attention. Otherwise each token attends to its `top_k` visible tokens; a token
    competes for its own place. No choice depends on the future.

    The choice and the attention to it agree with flash-linear-attention's plain reference (fla-core 0.6).

    Differences from the paper:

    * Its second stage, which trains all weights under the choice with the loss over the chosen tokens, is not here.
    * The loss is the mean over the tokens that see two or more.
    * q and k of the indexer have neither positions nor a norm (the published code turns a part of their channels and
      has a layer norm on k), and q is read from h, not from the latent query of its attention.
    * w is divided by sqrt(index_heads index_dim) and has no bias, as in the published code: the indexer needs a
      direction that the inputs of all tokens share, or it can learn no dot product.
    * Decoding needs the index keys of the past, which a cache of keys and values does not hold: not supported.
    * It runs in multi-query attention over latents, so one choice for all heads costs nothing; here heads read their
      own keys. A list of single tokens is a layout with blocks of one: exact, but the kernels gather row by row, and
      beside the indexer's O(N M) time the choice takes O(N M) memory. The paper has kernels for both.
    """

    config: DSAConfig

    def __init__(self, config: DSAConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.index_query = nn.Linear(shape.hidden_size, config.index_heads * config.index_dim, bias=False)
        self.index_key = nn.Linear(shape.hidden_size, config.index_dim, bias=False)
        self.index_weight = nn.Linear(shape.hidden_size, config.index_heads, bias=False)

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
        """See the base class. Time and memory O(N M) for the indexer; while training, dense attention and its loss."""
        context = context or AttentionContext()
        scale = self.shape.head_dim**-0.5 if scale is None else scale
        selection = self.selection(q, k, mask)
        with torch.autocast(q.device.type, enabled=False):
            scores = self.scores(*self._indexed(context.hidden_states, k, mask), mask, selection, scale)
            if self.training:
                dense = attend_densely(q, k, v, mask, selection, scale=scale, context=context)
                if not torch.is_grad_enabled():
                    return dense
                loss = self._divergence(scores, *mask.without_padding(q, k, v)[:2], mask, selection, scale)
                return dense._replace(losses={"distill": self.config.distill_weight * loss})
            layout = selection.layout(self.choose(scores, selection, context), q, k, mask)
        backend = choose_backend(self.config.backend, q.device, dtype=q.dtype, head_dim=max(q.shape[-1], v.shape[-1]))
        q, k, v = mask.without_padding(q, k, v)
        out, _ = block_sparse_attention(
            q, k, v, layout, scale=scale, causal=mask.causal, key_valid=mask.key_valid, backend=backend
        )
        if not context.listen:
            return AttentionOutput(out)
        ran = what_runs(backend, q, k, v, layout, causal=mask.causal)
        layout = layout.expand_heads(self.shape.num_heads)
        attended = layout.attended_pairs(causal=mask.causal, key_valid=mask.key_valid)
        return AttentionOutput(out, stats=AttentionStats(attended, mask.visible_pairs(q, k), ran, layout))

    def selection(self, q: Tensor, k: Tensor, mask: AttentionMask) -> Selection:
        """Every visible token competes, the token itself too; none is kept for its own sake."""
        selection = super().selection(q, k, mask)
        return replace(selection, forced=torch.zeros_like(selection.forced), candidates=selection.visible)

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, selection: Selection, scale: float
    ) -> Tensor:
        """Equation 1: `(batch, 1, query_length, key_length)`, from what the indexer made of the layer's input.

        Args:
            q: Index queries, `(batch, index_heads, query_length, index_dim)`.
            k: Index keys, `(batch, 1, key_length, index_dim)`.
            v: Weights, `(batch, index_heads, query_length, 1)`.
            mask: Not looked at.
            selection: Not looked at.
            scale: Not looked at.
        """
        parts = torch.arange(q.shape[2], device=q.device).split(rows_at_a_time(q, k))
        found = [(v[:, :, rows] * block_scores(q[:, :, rows], k).relu()).sum(1, keepdim=True) for rows in parts]
        return torch.cat(found, 2)

    def _indexed(self, hidden: Tensor | None, k: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries, keys and weights of all tokens, float32 or more."""
        assert hidden is not None, "the capability record asks for hidden states"
        if hidden.shape[1] != k.shape[2]:
            raise ValueError(
                f"attention 'dsa' needs the layer's input for all {k.shape[2]} tokens, got {hidden.shape[1]}: it "
                "cannot decode with a cache; generate without one"
            )
        hidden = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        if mask.key_valid is not None:
            hidden = hidden.masked_fill(~mask.key_valid[:, :, None], 0.0)
        layers = (self.index_query, self.index_key, self.index_weight)
        query, key, weight = (linear(hidden, layer.weight.to(hidden.dtype)) for layer in layers)
        heads, width = self.config.index_heads, self.config.index_dim
        query = query.unflatten(-1, (heads, width)).transpose(1, 2)
        return query, key.unsqueeze(1), weight.transpose(1, 2).unsqueeze(-1) * (heads * width) ** -0.5

    def _divergence(
        self, scores: Tensor, q: Tensor, k: Tensor, mask: AttentionMask, selection: Selection, scale: float
    ) -> Tensor:
        """Equation 3, mean over the real rows that see two tokens or more."""
        visible = selection.visible.expand_as(scores)
        some = visible.any(-1, keepdim=True)
        log_index = scores.masked_fill(~visible & some, -torch.inf).log_softmax(-1).masked_fill(~visible, 0.0)
        total, number = scores.new_zeros(()), scores.new_zeros(())
        for rows in torch.arange(q.shape[2], device=q.device).split(rows_at_a_time(q, k)):
            # Every head's row sums to 1, or to 0 where there is nothing to learn from.
            target = dense_weights(q, k, mask, scale, rows).mean(1, keepdim=True)
            live = (target.sum(-1, keepdim=True) > 0) & (visible[:, :, rows].sum(-1, keepdim=True) > 1)
            target = target.masked_fill(~live, 0.0)
            total = total + (torch.special.xlogy(target, target) - target * log_index[:, :, rows]).sum()
            number = number + live.sum()
        return total / number.clamp(min=1)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Chosen tokens, and the indexer's linear maps and scores; not the training's dense attention."""
        config, hidden = self.config, self.shape.hidden_size
        maps = 2 * query_length * hidden * (config.index_heads * (config.index_dim + 1) + config.index_dim)
        scores = 2 * config.index_heads * query_length * key_length * config.index_dim
        return super().flops(batch, query_length, key_length, mask) + batch * (maps + scores)
