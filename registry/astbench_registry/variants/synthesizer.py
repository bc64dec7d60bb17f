"""Synthesizer (Tay et al. 2020, arXiv 2005.00743): attention logits without token-token products."""

from __future__ import annotations

from math import ceil, isqrt

import torch
from torch import Tensor, nn

from astbench_registry.configs.synthesizer import SynthesizerConfig
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    ExplicitWeights,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.positions import longest_input, require_length


class SynthesizerAttention(Attention):
    """softmax(B) V, where row i of B (one logit per position) comes from token i alone, or from position i.

    * "dense": B_i = W_2 relu(W_1 x_i + b_1) + b_2 for each head, with x_i the layer's input and W_1 as wide as
      the head.
    * "random": B = R, a matrix for each head.
    * "factorized_dense": two such networks give u_i and w_i of lengths a and b, a b >= positions, and the logit
      of position j is u_i[j // b] w_i[j % b].
    * "factorized_random": B = R_1 R_2^T for each head.
    * `mix_dense`: (1 - alpha) q . k / sqrt(d) + alpha B, with a learned alpha = sigmoid(.) that starts at 1/2.

    The cost stays N x M in time and memory: what is saved is the product of queries and keys. q and k are not
    read unless mixed, so that the backbone's query and key projections get no gradient.

    Differs from the paper and from its authors' code:
    * Of u and w one is repeated and the other tiled, so that every position has its own product; tiling both
      alike, as the paper has it, repeats logits wherever a and b share a factor. a and b are near the root.
    * B is multiplied by `scale` sqrt(d), which stands for the interface's scale and is 1 by default.
    * The authors' code takes relu(q) for the hidden layer of "dense", and no biases; W_1 and b_1 are the
      variant's own here, as in the paper's equation. Their starts are kept: Glorot for R and the networks, a
      unit normal for R_1 and R_2.

    Decoding computes a step's row from that token and its position, and reads the values seen so far.
    """

    config: SynthesizerConfig
    R: Tensor
    R_1: Tensor
    R_2: Tensor

    def __init__(self, config: SynthesizerConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.longest, heads, generator = longest_input("synthesizer", config.max_length, shape), shape.num_heads, None
        if not config.trainable:  # logits that nothing changes depend on the seed and the layer alone
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + shape.layer_index)
        if config.kind == "dense":
            self.network = TokenNetwork(shape, self.longest)
        elif config.kind == "factorized_dense":
            b = isqrt(self.longest)
            self.rows, self.columns = TokenNetwork(shape, ceil(self.longest / b)), TokenNetwork(shape, b)
        elif config.kind == "random":
            bound = (3 / self.longest) ** 0.5  # Glorot's
            self._keep("R", (torch.rand(heads, self.longest, self.longest, generator=generator) * 2 - 1) * bound)
        else:
            self._keep("R_1", torch.randn(heads, self.longest, config.k, generator=generator))
            self._keep("R_2", torch.randn(heads, self.longest, config.k, generator=generator))
        if config.mix_dense:
            self.alpha = nn.Parameter(torch.zeros(()))

    def _keep(self, name: str, value: Tensor) -> None:
        if self.config.trainable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

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
        """See the base class. Time and memory O(N M)."""
        with torch.autocast(q.device.type, enabled=False):
            weights = self._weights(q, k, mask, scale, context)
            values = mask.without_padding(q, k, v)[2].to(weights.dtype)
            out = _grouped(weights.expand(v.shape[0], -1, -1, -1), values).to(q.dtype)
        return AttentionOutput(out, stats=self.all_pairs(q, k, mask, context))

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
        """See the base class. All of them are held at once, as in :meth:`forward`."""
        weights = self._weights(q, k, mask, scale, context).expand(q.shape[0], -1, -1, -1)

        def of(rows: Tensor) -> Tensor:
            seen = mask.visible_rows(rows, q.shape[2], k.shape[2], q.shape[0])
            return weights[:, :, rows].masked_fill(~seen, 0.0)

        return ExplicitWeights(of, self.all_pairs(q, k, mask, context))

    def _weights(
        self, q: Tensor, k: Tensor, mask: AttentionMask, scale: float | None, context: AttentionContext | None
    ) -> Tensor:
        """softmax(B), `(batch or 1, heads, queries, keys)`, float32 or more."""
        require_length("synthesizer", k.shape[2], self.longest)
        factor = 1.0 if scale is None else scale * self.shape.head_dim**0.5
        wide = torch.promote_types(q.dtype, torch.float32)  # half precision would round logits and weights
        q, k = (x.to(wide) for x in mask.without_padding(q, k, k)[:2])
        logits = self._synthesized(q, k, mask, context)
        if self.config.mix_dense:
            alpha = self.alpha.to(wide).sigmoid()
            products = _grouped(q, k.transpose(-1, -2)) * self.shape.head_dim**-0.5
            logits = (1 - alpha) * products + alpha * logits
        return _softmax(logits * factor, mask.dense(q.shape[2], k.shape[2], q.device))

    def _synthesized(self, q: Tensor, k: Tensor, mask: AttentionMask, context: AttentionContext | None) -> Tensor:
        """B for the rows of `q` and the positions of `k`: `(batch or 1, heads, queries, keys)`."""
        first, keys, dtype = mask.query_offset, k.shape[2], q.dtype
        rows = slice(first, first + q.shape[2])
        if self.config.kind == "random":
            return self.R[None, :, rows, :keys].to(dtype)
        if self.config.kind == "factorized_random":
            return (self.R_1[:, rows].to(dtype) @ self.R_2[:, :keys].to(dtype).transpose(-1, -2))[None]
        if context is None or context.hidden_states is None:
            raise ValueError(f"attention 'synthesizer' of kind {self.config.kind} needs the layer's hidden states")
        x = context.hidden_states.to(dtype)
        valid = mask.valid_queries(q.shape[2])
        if valid is not None:
            x = x.masked_fill(~valid[:, :, None], 0.0)
        if self.config.kind == "dense":
            return self.network(x, keys)
        # Position j = row b + column, cut off after the last key.
        row, column = self.rows(x, ceil(keys / self.columns.size)), self.columns(x, self.columns.size)
        return (row[..., :, None] * column[..., None, :]).flatten(-2)[..., :keys]

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Networks, values, and products when mixed; R_1 R_2^T, which no input changes, is left out."""
        shape, width = self.shape, 0
        if self.config.kind == "dense":
            width = shape.hidden_size + key_length
        elif self.config.kind == "factorized_dense":
            width = 2 * shape.hidden_size + ceil(key_length / self.columns.size) + self.columns.size
        pairs = (2 if self.config.mix_dense else 1) * key_length
        return 2 * batch * shape.num_heads * query_length * shape.head_dim * (width + pairs)

    def state_size(self, key_length: int) -> int:
        """The values; the keys too when mixed."""
        cache = self.kv_cache_size(key_length)
        return cache if self.config.mix_dense else cache // 2


class TokenNetwork(nn.Module):
    """Two layers that map each token to `size` numbers for each head; the hidden layer is as wide as a head."""

    def __init__(self, shape: AttentionShape, size: int) -> None:
        super().__init__()
        if not shape.hidden_size:
            raise ValueError("attention 'synthesizer' reads hidden states and needs AttentionShape.hidden_size")
        heads, width = shape.num_heads, shape.head_dim
        self.size = size
        self.W_1, self.b_1 = _glorot(heads, shape.hidden_size, width), nn.Parameter(torch.zeros(heads, 1, width))
        self.W_2, self.b_2 = _glorot(heads, width, size), nn.Parameter(torch.zeros(heads, 1, size))

    def forward(self, x: Tensor, size: int) -> Tensor:
        """`(batch, length, hidden_size)` to the first `size` numbers, `(batch, heads, length, size)`."""
        W_1, b_1, W_2, b_2 = (w.to(x.dtype) for w in (self.W_1, self.b_1, self.W_2, self.b_2))
        hidden = torch.relu(torch.einsum("bne,hed->bhnd", x, W_1) + b_1)
        return torch.einsum("bhnd,hdm->bhnm", hidden, W_2[..., :size]) + b_2[..., :size]


def _glorot(heads: int, fan_in: int, fan_out: int) -> nn.Parameter:
    return nn.Parameter((torch.rand(heads, fan_in, fan_out) * 2 - 1) * (6 / (fan_in + fan_out)) ** 0.5)


def _grouped(rows: Tensor, shared: Tensor) -> Tensor:
    """`(batch, heads, n, m)` times `(batch, kv_heads, m, p)`, each matrix of the latter for a group of heads."""
    groups = rows.unflatten(1, (shared.shape[1], -1)).flatten(2, 3)  # (batch, kv_heads, group * n, m)
    return (groups @ shared).unflatten(2, (-1, rows.shape[2])).flatten(1, 2)


def _softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Rows that see nothing are zero."""
    if allowed is None:
        return logits.softmax(-1)
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(~allowed, 0.0)
