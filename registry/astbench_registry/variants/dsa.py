"""DeepSeek sparse attention: tokens by a lightning indexer (DeepSeek-AI 2025, DeepSeek-V3.2-Exp)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from astbench_registry.block_selection import BlockSelector, Call, Selection, block_scores
from astbench_registry.block_selection.dense_layers import attend_densely
from astbench_registry.block_selection.dense_weights import dense_weights, rows_at_a_time
from astbench_registry.configs.dsa import DSAConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape, AttentionStats
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.widening import widened


class TokenSelector(BlockSelector):
    """The best `top_k` visible tokens; every token competes for its own place, none is always kept."""

    def selection(self, call: Call) -> Selection:
        """See the base class."""
        selection = super().selection(call)
        return replace(selection, always_kept=torch.zeros_like(selection.always_kept), candidates=selection.visible)


class DeepSeekSparseAttention(Attention):
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
    block_sparse = True

    def __init__(self, config: DSAConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.selector = TokenSelector(config)
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
        call = Call.of(self.shape, q, k, v, mask, scale, context)
        selection = self.selector.selection(call)
        with torch.autocast(q.device.type, enabled=False):
            scores = self.index_scores(call)
            if self.training:
                dense = attend_densely(call, selection)
                if not torch.is_grad_enabled():
                    return dense
                loss = _divergence(scores, call.without_padding(), selection)
                return dense._replace(losses={"distill": self.config.distill_weight * loss})
            layout = selection.layout(self.selector.choose(scores, selection), call)
        backend = call.backend(self.config.backend)
        call = call.without_padding()
        out, _ = call.attend(layout, backend)
        if not call.context.collect_stats:
            return AttentionOutput(out)
        ran = call.ran(layout, backend)
        layout = layout.expand_heads(self.shape.num_heads)
        attended = layout.attended_pairs(causal=mask.causal, key_valid=mask.key_valid)
        return AttentionOutput(out, stats=AttentionStats(attended, mask.visible_pairs(q, k), ran, layout))

    def index_scores(self, call: Call) -> Tensor:
        """Equation 1: `(batch, 1, query_length, key_length)`. Time and memory O(N M)."""
        query, key, weight = self._index(call)
        parts = torch.arange(query.shape[2], device=query.device).split(rows_at_a_time(query, key))
        found = [
            (weight[:, :, rows] * block_scores(query[:, :, rows], key).relu()).sum(1, keepdim=True) for rows in parts
        ]
        return torch.cat(found, 2)

    def _index(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's queries, keys and weights of all tokens, float32 or more.

        `(batch, index_heads, length, index_dim)`, `(batch, 1, length, index_dim)`, `(batch, index_heads, length, 1)`.
        """
        hidden, length, valid = call.context.hidden_states, call.k.shape[2], call.mask.key_valid
        assert hidden is not None, "the capability record asks for hidden states"
        if hidden.shape[1] != length:
            raise ValueError(
                f"attention 'dsa' needs the layer's input for all {length} tokens, got {hidden.shape[1]}: it "
                "cannot decode with a cache; generate without one"
            )
        hidden = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        if valid is not None:
            hidden = hidden.masked_fill(~valid[:, :, None], 0.0)
        layers = (self.index_query, self.index_key, self.index_weight)
        query, key, weight = (linear(hidden, widened(layer.weight, hidden.dtype)) for layer in layers)
        heads, width = self.config.index_heads, self.config.index_dim
        query = query.unflatten(-1, (heads, width)).transpose(1, 2)
        return query, key.unsqueeze(1), weight.transpose(1, 2).unsqueeze(-1) * (heads * width) ** -0.5

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Chosen tokens, and the indexer's linear maps and scores; not the training's dense attention."""
        config, hidden = self.config, self.shape.hidden_size
        maps = 2 * query_length * hidden * (config.index_heads * (config.index_dim + 1) + config.index_dim)
        scores = 2 * config.index_heads * query_length * key_length * config.index_dim
        chosen = (
            4 * self.shape.num_heads * self.shape.head_dim * self.selector.kept_keys(query_length, key_length, mask)
        )
        return batch * (chosen + maps + scores)

    def state_size(self, key_length: int) -> int:
        """The KV cache: any token may be chosen later."""
        return self.kv_cache_size(key_length)


def _divergence(scores: Tensor, call: Call, selection: Selection) -> Tensor:
    """Equation 3, mean over the real rows that see two tokens or more.

    Args:
        scores: From :meth:`DeepSeekSparseAttention.index_scores`.
        call: Zeros where there is padding.
        selection: What each token sees.
    """
    visible = selection.visible.expand_as(scores)
    some = visible.any(-1, keepdim=True)
    log_index = scores.masked_fill(~visible & some, -torch.inf).log_softmax(-1).masked_fill(~visible, 0.0)
    total, number = scores.new_zeros(()), scores.new_zeros(())
    for rows in torch.arange(call.q.shape[2], device=scores.device).split(rows_at_a_time(call.q, call.k)):
        # Every head's row sums to 1, or to 0 where there is nothing to learn from.
        target = dense_weights(call, rows).mean(1, keepdim=True)
        live = (target.sum(-1, keepdim=True) > 0) & (visible[:, :, rows].sum(-1, keepdim=True) > 1)
        target = target.masked_fill(~live, 0.0)
        total = total + (torch.special.xlogy(target, target) - target * log_index[:, :, rows]).sum()
        number = number + live.sum()
    return total / number.clamp(min=1)
