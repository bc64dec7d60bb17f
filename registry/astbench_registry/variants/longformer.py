"""Longformer: sliding window plus global tokens (Beltagy et al. 2020, arXiv 2004.05150), in linear memory."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from astbench_kernels.layout import ceil_div
from astbench_registry.configs.longformer import LongformerConfig
from astbench_registry.errors import CapabilityError
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    AttentionStats,
    ExplicitWeights,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox import sliding_chunks
from astbench_registry.toolbox.explicit import softmax_rows

MIN_CHUNK = 32
"""Query rows handled together at least; below, the copies of the keys cost more than they save."""

PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
"""What backbones call their linear layers."""


class LongformerAttention(Attention):
    """Softmax over the keys j with |i - j| <= window * dilation, i - j a multiple of dilation, or j global.

    A global query sees every key. Causal: of all these, the keys j <= i. Global are the first `num_global`
    real tokens of a sequence and those in `context.global_tokens`.

    With `global_projections`, global rows are softmax(Q_g K_g^T) V_g with projections of their own over all
    tokens (section 3.1, "Linear Projections for Global Attention"); other rows see global tokens by the
    ordinary keys and values.

    Differs from the paper:

    * `window` counts one side, the paper's w both.
    * The paper does not combine global tokens with a causal mask; here a causal global token sees its past
      and is seen by what comes later.
    * The own key projection has no bias: it adds the same to all logits of a row, and softmax takes it away.
    * Grouped key/value heads and decoding are not in the paper, nor supported with `global_projections`.

    Rows are cut into chunks of about `window`, each reading one run of chunk + 2 window keys and the global
    ones, so memory is O(N), at most 3 + globals / chunk copies of the keys.

    `backend="transformers"` multiplies the windows as its LongformerSelfAttention does, which holds all weights
    at once, O(N window); masks, softmax and global rows stay as here.
    """

    config: LongformerConfig

    def __init__(self, config: LongformerConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        dilated = shape.num_heads if config.dilated_heads is None else config.dilated_heads
        self.dilated_heads = dilated if config.dilation > 1 else 0
        shared = shape.num_heads // shape.num_kv_heads
        if self.dilated_heads > shape.num_heads or self.dilated_heads % shared:
            raise ValueError(
                f"--attention.dilated_heads must be at most {shape.num_heads} and a multiple of the {shared} heads "
                f"that share a key head, got {self.dilated_heads}"
            )
        self.theirs = None
        if config.backend == "transformers":
            try:
                self.theirs = sliding_chunks.load_layer()
            except ImportError as error:
                raise ValueError(
                    "attention 'longformer' with --attention.backend=transformers cannot run here: package "
                    "transformers is not installed; pip install 'astbench'"
                ) from error
        if config.global_projections:
            width = shape.num_heads * shape.head_dim
            self.query_global = nn.Linear(shape.hidden_size, width)
            self.key_global = nn.Linear(shape.hidden_size, width, bias=False)
            self.value_global = nn.Linear(shape.hidden_size, width)
            for linear in (self.query_global, self.key_global, self.value_global):
                nn.init.normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def adopt(self, layer: nn.Module) -> None:
        """Start the global projections from the layer's own. See the base class."""
        if not self.config.global_projections:
            return
        for own, theirs in zip(
            (self.query_global, self.key_global, self.value_global), plain_projections(layer), strict=True
        ):
            if theirs.weight.shape != own.weight.shape:
                raise CapabilityError(
                    f"attention 'longformer' with --attention.global_projections=true expects projections of "
                    f"{tuple(own.weight.shape)}, {type(layer).__name__} has {tuple(theirs.weight.shape)}"
                )
            own.weight.copy_(theirs.weight)
            if own.bias is not None:
                own.bias.zero_() if theirs.bias is None else own.bias.copy_(theirs.bias)

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
        """See the base class. Time and memory O(N (window + globals))."""
        context = context or AttentionContext()
        chosen = self._global_tokens(q.shape[0], k, mask, context)
        q, k, v = mask.without_padding(q, k, v)
        heads, key_heads = self.dilated_heads, self.dilated_heads * k.shape[1] // q.shape[1]
        outs, seen = [], []
        for dilation, mine, keys in (
            (self.config.dilation, slice(heads), slice(key_heads)),
            (1, slice(heads, None), slice(key_heads, None)),
        ):
            if q[:, mine].shape[1]:
                out, number = self._window_rows(q[:, mine], k[:, keys], v[:, keys], mask, chosen, dilation, scale)
                outs.append(out)
                seen.append(number[:, None].expand(-1, out.shape[1], -1))
        out, number = torch.cat(outs, 1), torch.cat(seen, 1)  # number: (batch, heads, query_length)
        rows = chosen[:, mask.query_offset : mask.query_offset + q.shape[2]]
        if bool(rows.any()):
            if self.config.global_projections:
                q, k, v = self._project(context.hidden_states, q, k, mask)
            answer, answer_number = self._global_rows(q, k, v, mask, rows, scale)
            place = (rows.cumsum(1) - 1).clamp(min=0)
            answer = answer.take_along_dim(place[:, None, :, None], 2)
            out = torch.where(rows[:, None, :, None], answer, out)
            number = torch.where(rows[:, None], answer_number.gather(1, place)[:, None], number)
        stats = None
        if context.collect_stats:
            attended = number.sum(-1, dtype=torch.float64)
            backend = "transformers" if self.theirs is not None else f"sdpa-{q.device.type}"
            stats = AttentionStats(attended, mask.visible_pairs(q, k), backend)
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
        """See the base class; without projections of their own for global tokens."""
        chosen = self._global_tokens(q.shape[0], k, mask, context or AttentionContext())
        key = torch.arange(k.shape[2], device=q.device)
        dilated = torch.arange(q.shape[1], device=q.device)[:, None, None] < self.dilated_heads
        step = torch.where(dilated, self.config.dilation, 1)  # (heads, 1, 1)

        def pattern(rows: Tensor) -> Tensor:
            position = rows + mask.query_offset
            apart = key - position[:, None]
            near = (apart.abs() <= self.config.window * step) & (apart % step == 0)
            return near | chosen[:, None, None, :] | chosen[:, None, position, None]

        stats = self.some_pairs(q, k, mask, context, pattern(torch.arange(q.shape[2], device=q.device)))
        return ExplicitWeights(softmax_rows(q, k, mask, scale, pattern), stats)

    def _global_tokens(self, batch: int, k: Tensor, mask: AttentionMask, context: AttentionContext) -> Tensor:
        """Bool `(batch, key_length)`: real tokens that are global."""
        length = k.shape[2]
        real = mask.key_valid
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=k.device)
        chosen = real.cumsum(1) <= self.config.num_global
        named = context.global_tokens
        if named is not None:
            if named.shape[0] != batch or named.shape[1] > length:
                raise ValueError(f"global_tokens must be ({batch}, {length} or fewer), got {tuple(named.shape)}")
            # While decoding, the task named them in the prompt; what was written since is not global.
            chosen = chosen | pad(named, (0, length - named.shape[1]))
        return chosen & real

    def _window_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        chosen: Tensor,
        dilation: int,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Every row over its window and the global keys; and how many keys each row saw, `(batch, query_length)`.

        A unit is a run of `chunk` rows that are `dilation` apart; to them the window is one of neighbours.
        """
        ordinary = ~chosen if mask.key_valid is None else mask.key_valid & ~chosen
        listed, real = list_tokens(chosen)  # (batch, globals)
        if self.theirs is not None and len(q):  # theirs cannot reshape a batch of none
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            return sliding_chunks.window_rows(self.theirs, q, k, v, ordinary, listed, real, self.config.window, scale)
        batch, _, length, _ = q.shape
        classes, chunk, chunks, window, reach = self._sizes(length, k.shape[2], dilation, mask)
        device = q.device
        first = torch.arange(classes, device=device)[:, None] + dilation * chunk * torch.arange(chunks, device=device)
        first = (first + mask.query_offset).flatten()  # (units,): position of the first row
        row = first[:, None] + dilation * torch.arange(chunk, device=device)  # (units, chunk)
        step = torch.arange(reach, device=device) - window
        position = first[:, None] + dilation * step  # (units, reach)
        distance = step - torch.arange(chunk, device=device)[:, None]  # (chunk, reach), in steps
        near = (distance <= (0 if mask.causal else window)) & (distance >= -window)
        inside = (position >= 0) & (position < k.shape[2])
        position = position.clamp(0, k.shape[2] - 1)
        known = real[:, None, None, :]
        if mask.causal:
            known = known & (listed[:, None, None, :] <= row[:, :, None])
        allowed = torch.cat(
            [
                near & (inside & ordinary[:, position])[:, :, None, :],
                known.expand(-1, len(first), chunk, -1),
            ],
            -1,
        ).flatten(0, 1)  # (batch * units, chunk, reach + globals)
        keys, values = (torch.cat([x[:, :, position], _at(x, listed, len(first))], 3) for x in (k, v))
        rows = pad(q, (0, 0, 0, classes * chunk * chunks - length)).unflatten(2, (chunks, chunk, classes))
        out = scaled_dot_product_attention(
            rows.permute(0, 4, 2, 1, 3, 5).flatten(0, 2),  # (batch * units, heads, chunk, head_dim)
            keys.transpose(1, 2).flatten(0, 1),
            values.transpose(1, 2).flatten(0, 1),
            attn_mask=allowed.unsqueeze(1),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out = out.masked_fill(~allowed.any(-1)[:, None, :, None], 0.0).unflatten(0, (batch, classes, chunks))
        number = allowed.sum(-1).unflatten(0, (batch, classes, chunks))
        out = out.permute(0, 3, 2, 4, 1, 5).flatten(2, 4)[:, :, :length]
        return out, number.permute(0, 2, 3, 1).flatten(1)[:, :length]

    def _sizes(
        self, length: int, key_length: int, dilation: int, mask: AttentionMask
    ) -> tuple[int, int, int, int, int]:
        """Classes of rows that are `dilation` apart, rows per chunk, chunks per class, window, keys per chunk."""
        classes = min(dilation, length)
        per_class = ceil_div(length, classes)
        window = min(self.config.window, ceil_div(key_length, dilation))
        chunk = min(max(window, MIN_CHUNK), per_class)
        return classes, chunk, ceil_div(per_class, chunk), window, chunk + (1 if mask.causal else 2) * window

    def _global_rows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, rows: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """The global rows alone over all keys, `(batch, heads, globals, head_dim)`, and how many keys each saw."""
        listed, real = list_tokens(rows)
        allowed = real[:, :, None] if mask.key_valid is None else real[:, :, None] & mask.key_valid[:, None, :]
        if mask.causal:
            position = torch.arange(k.shape[2], device=k.device)
            allowed = allowed & (position <= listed[:, :, None] + mask.query_offset)
        allowed = allowed.expand(-1, -1, k.shape[2])
        out = scaled_dot_product_attention(
            q.take_along_dim(listed[:, None, :, None], 2),
            k,
            v,
            attn_mask=allowed.unsqueeze(1),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.masked_fill(~real[:, None, :, None], 0.0), allowed.sum(-1)

    def _project(
        self, hidden: Tensor | None, q: Tensor, k: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Global queries, keys and values of all tokens, `(batch, heads, length, head_dim)`."""
        assert hidden is not None, "the capability record asks for hidden states"
        if hidden.shape[1] != k.shape[2]:
            raise ValueError(
                f"global tokens among the queries need the layer's input for all {k.shape[2]} tokens, got "
                f"{hidden.shape[1]}; set --attention.global_projections=false to decode through them"
            )
        if mask.key_valid is not None:
            hidden = hidden.masked_fill(~mask.key_valid[:, :, None], 0.0)
        projected = (linear(hidden) for linear in (self.query_global, self.key_global, self.value_global))
        query, key, value = (
            x.unflatten(-1, (self.shape.num_heads, self.shape.head_dim)).transpose(1, 2).to(q.dtype) for x in projected
        )
        return query, key, value

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """The matmuls of windows, of `num_global` global tokens (the task may name more) and of their projections."""
        shape, known = self.shape, min(self.config.num_global, key_length)
        pairs = 0  # (query, key), each in two matmuls
        if self.theirs is not None:
            pairs = shape.num_heads * sliding_chunks.computed_pairs(query_length, self.config.window, known)
        else:
            for dilation, heads in (
                (self.config.dilation, self.dilated_heads),
                (1, shape.num_heads - self.dilated_heads),
            ):
                classes, chunk, chunks, _, reach = self._sizes(query_length, key_length, dilation, mask)
                pairs += heads * classes * chunk * chunks * (reach + known)
        rows = min(max(0, known - mask.query_offset), query_length)
        pairs += shape.num_heads * rows * key_length
        total = 4 * batch * pairs * shape.head_dim
        if self.config.global_projections:
            total += 6 * batch * query_length * shape.hidden_size * shape.num_heads * shape.head_dim
        return total

    def state_size(self, key_length: int) -> int:
        """The keys and values that a later window reaches back to, the current one and `num_global` global ones."""
        dilation = self.config.dilation if self.dilated_heads else 1
        return self.kv_cache_size(min(key_length, self.config.window * dilation + 1 + self.config.num_global))


def list_tokens(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Bool `(batch, length)` -> positions of the True ones `(batch, most)`, and which of these are not filling."""
    count = chosen.sum(1)
    most = int(count.max()) if count.numel() else 0
    order = torch.sort((~chosen).to(torch.uint8), dim=1, stable=True).indices[:, :most]
    return order, torch.arange(most, device=chosen.device) < count[:, None]


def _at(x: Tensor, listed: Tensor, units: int) -> Tensor:
    """Keys `(batch, heads, length, d)` at positions `(batch, n)`, for every unit: `(batch, heads, units, n, d)`."""
    return x.take_along_dim(listed[:, None, :, None], 2).unsqueeze(2).expand(-1, -1, units, -1, -1)


def plain_projections(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The query, key and value linears of a backbone's attention layer, if they alone make q, k and v.

    Raises:
        CapabilityError: rotary positions are applied after them, or there are no such linears.
    """
    flag = "attention 'longformer' with --attention.global_projections=true"
    # A rotary layer is handed its rotations, or holds the module that makes them.
    handed = "position_embeddings" in inspect.signature(layer.forward).parameters
    holds = any("rotary" in name.lower() for name, _ in layer.named_modules())
    if handed or holds:
        raise CapabilityError(
            f"{flag} cannot serve {type(layer).__name__}: rotary positions turn its queries and keys after their "
            "projections; set --attention.global_projections=false"
        )
    for names in PROJECTIONS:
        query, key, value = (getattr(layer, name, None) for name in names)
        if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
            return query, key, value
    raise CapabilityError(
        f"{flag} needs linear layers {' or '.join('/'.join(names) for names in PROJECTIONS)}, which "
        f"{type(layer).__name__} does not have; set --attention.global_projections=false"
    )
