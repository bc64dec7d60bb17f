"""The one interface of every attention: called after the backbone's projections and position encoding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from astbench_kernels import BlockLayout
from astbench_kernels.layout import visible_pairs
from astbench_registry.block_summaries import BlockSummaries
from astbench_registry.capabilities import AttentionConfig, Pattern


@dataclass(frozen=True)
class AttentionShape:
    """The layer that a module is built for.

    Attributes:
        num_heads: Query heads H.
        num_kv_heads: Key/value heads, a divisor of H.
        head_dim: D.
        layer_index: From 0, counted among the layers of the same stack.
        num_layers: Layers of that stack.
        hidden_size: Width E of the layer's input, for variants that read it.
        max_positions: Longest sequence the backbone takes, for variants with parameters per position; 0 when unknown.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_index: int = 0
    num_layers: int = 1
    hidden_size: int = 0
    max_positions: int = 0


@dataclass(frozen=True)
class AttentionMask:
    """What each query may see, in O(batch x length), never an N x M tensor.

    Attributes:
        pattern: One of the four patterns. Under "causal_self" query row i stands at position
            `query_offset + i` and sees keys at positions up to its own. Under "causal_cross" it sees all
            keys, but the queries arrive one after the other, so none may use what a later one says.
        query_offset: Position of query row 0 (> 0 while decoding with a cache).
        key_valid: Bool `(batch, key_length)`, False for padding; None when every key is real.
        query_valid: Bool `(batch, query_length)`; for self-attention it follows from `key_valid`.
    """

    pattern: Pattern = "bidirectional_self"
    query_offset: int = 0
    key_valid: Tensor | None = None
    query_valid: Tensor | None = None

    @property
    def causal(self) -> bool:
        """Keys after the query's position are hidden."""
        return self.pattern == "causal_self"

    @property
    def cross(self) -> bool:
        """Keys are another sequence than the queries."""
        return self.pattern.endswith("cross")

    @property
    def sequential(self) -> bool:
        """A query may not depend on later queries."""
        return self.pattern.startswith("causal")

    def valid_queries(self, query_length: int) -> Tensor | None:
        """Bool `(batch, query_length)` or None when every query is real."""
        if self.query_valid is not None or self.cross or self.key_valid is None:
            return self.query_valid
        return self.key_valid[:, self.query_offset : self.query_offset + query_length]

    def visible_pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """float64 `(batch,)`: the (query, key) pairs that a dense attention would compute."""
        return visible_pairs(
            q.shape[2],
            k.shape[2],
            causal=self.causal,
            query_offset=self.query_offset,
            key_valid=self.key_valid,
            batch=q.shape[0],
            device=q.device,
        )

    def without_padding(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(batch, heads, length, d)` with zeros where there is padding.

        Padding may hold anything, NaN included, and a weight of zero would keep a NaN. Queries too: nobody reads
        a padded row's output, but in the backward pass its gradient of zero, times NaN, would reach all keys.
        """
        if self.key_valid is not None:
            hidden = ~self.key_valid[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        return self.real_queries(q), k, v

    def real_queries(self, q: Tensor) -> Tensor:
        """The queries alone of :meth:`without_padding`."""
        valid = self.valid_queries(q.shape[2])
        return q if valid is None else q.masked_fill(~valid[:, None, :, None], 0.0)

    def dense(self, query_length: int, key_length: int, device: torch.device) -> Tensor | None:
        """Bool `(batch or 1, 1, query_length or 1, key_length)`, True = may be attended; None for everything.

        Cost: O(query_length x key_length) when causal.
        """
        mask = None
        if self.causal:
            position = torch.arange(query_length, device=device)[:, None] + self.query_offset
            mask = (torch.arange(key_length, device=device) <= position)[None, None]
        if self.key_valid is not None:
            padding = self.key_valid[:, None, None, :]
            mask = padding if mask is None else mask & padding
        return mask


@dataclass(frozen=True)
class AttentionContext:
    """What a variant may need beside the tensors.

    Attributes:
        step: Optimizer steps taken so far, for schedules.
        listen: Somebody wants :class:`AttentionStats`; when False they are not computed.
        hidden_states: The layer's input `(batch, query_length, hidden_size)`, only for variants whose
            capability record asks for it.
        global_tokens: Bool `(batch, key_length)`: tokens that the task wants seen by all and seeing all (the
            question's, in question answering), for variants that know such tokens; None when it names none.
        summaries: What earlier calls on the same KV cache found out about its key blocks, and this one adds to; None
            when nobody keeps it. It changes no result, only what has to be computed, without gradients.
    """

    step: int = 0
    listen: bool = False
    hidden_states: Tensor | None = None
    global_tokens: Tensor | None = None
    summaries: BlockSummaries | None = None


@dataclass(frozen=True)
class AttentionStats:
    """What was attended to in one call.

    Attributes:
        attended: float64 `(batch, heads)`: (query, key) pairs attended to; a kernel may compute more, see `backend`.
        visible: float64 `(batch,)`: pairs a dense attention would compute.
        backend: The kernel that ran.
        layout: The chosen blocks, for variants that choose blocks.
        coarse: float64 `(batch, heads)`: pairs computed beside those, with pooled keys or in another branch; None where
            there are none.
    """

    attended: Tensor
    visible: Tensor
    backend: str
    layout: BlockLayout | None = None
    coarse: Tensor | None = None

    @property
    def density(self) -> Tensor:
        """float64 `(heads,)`: computed pairs, those in `coarse` included, over visible pairs, over the batch."""
        computed = self.attended if self.coarse is None else self.attended + self.coarse
        return computed.sum(0) / self.visible.sum().clamp(min=1)


class AttentionOutput(NamedTuple):
    """What every call returns.

    Attributes:
        context: `(batch, heads, query_length, head_dim)`; rows that see nothing are zero.
        losses: Auxiliary losses by name, already weighted, to be added to the task's; only while training.
        stats: Filled when the context listens.
        log_prob: `(batch,)`, with gradient: log-probability of what was drawn at random for each sequence, of a variant
            that learns by policy gradient; only while training.
    """

    context: Tensor
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: AttentionStats | None = None
    log_prob: Tensor | None = None


class Attention(nn.Module):
    """Base of all variants: build from (config, shape), call with (q, k, v, mask).

    A subclass implements :meth:`forward`, and where it can :meth:`flops` and :meth:`state_size`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AttentionConfig]]

    def __init__(self, config: AttentionConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    @abstractmethod
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
        """Attend.

        Args:
            q: `(batch, num_heads, query_length, head_dim)`.
            k: `(batch, num_kv_heads, key_length, head_dim)`.
            v: As `k`.
            mask: What may be seen. Nothing in it may be ignored.
            scale: Factor on q . k; 1/sqrt(head_dim) by default.
            context: Step, listening, hidden states.
        """
        raise NotImplementedError

    def adopt(self, layer: nn.Module) -> None:
        """Called once, when the module is put into a model, with the backbone's attention layer.

        For variants that start from its projections; the others ignore it.

        Raises:
            CapabilityError: the variant needs projections that this layer does not have.
        """

    def all_pairs(
        self, q: Tensor, k: Tensor, mask: AttentionMask, context: AttentionContext | None, backend: str = "torch"
    ) -> AttentionStats | None:
        """Statistics of an attention that computes every visible pair; None when nobody listens."""
        if context is None or not context.listen:
            return None
        visible = mask.visible_pairs(q, k)
        return AttentionStats(visible[:, None].expand(-1, q.shape[1]), visible, backend)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int | None:
        """Operations of one forward call's matmuls (a multiply-add is 2); None: not declared."""
        return None

    def state_size(self, key_length: int) -> int | None:
        """Numbers that decoding needs per sequence after `key_length` tokens by the paper; None when not declared.

        Decoding here is given the full KV cache by the backbone, whatever the method needs of it.
        """
        return None

    def kv_cache_size(self, key_length: int) -> int:
        """Numbers in a full KV cache, the usual state."""
        return 2 * self.shape.num_kv_heads * key_length * self.shape.head_dim
