"""The one interface of every attention: called after the backbone's projections and position encoding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from astbench_kernels import BlockLayout, choose_backend
from astbench_registry.capabilities import AttentionConfig
from astbench_registry.mask import AttentionMask


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


class CacheState:
    """Base of what a variant keeps of one KV cache from call to call, such as summaries of its blocks."""


@dataclass(frozen=True)
class AttentionContext:
    """What a variant may need beside the tensors.

    Attributes:
        step: Optimizer steps taken so far, for schedules.
        collect_stats: Return :class:`AttentionStats` too; when False they are not computed.
        hidden_states: The layer's input `(batch, query_length, hidden_size)`, only for variants whose
            capability record asks for it.
        global_tokens: Bool `(batch, key_length)`: tokens that the task wants seen by all and seeing all (the
            question's, in question answering), for variants that know such tokens; None when it names none.
        summaries: What earlier calls on the same KV cache found out about its key blocks, and this one adds to; None
            when nobody keeps it. It changes no result, only what has to be computed, without gradients.
    """

    step: int = 0
    collect_stats: bool = False
    hidden_states: Tensor | None = None
    global_tokens: Tensor | None = None
    summaries: CacheState | None = None


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
        out: `(batch, heads, query_length, head_dim)`; rows that see nothing are zero.
        losses: Auxiliary losses by name, already weighted, to be added to the task's; only while training.
        stats: Filled when `collect_stats` is set.
        log_prob: `(batch,)`, with gradient: log-probability of what was drawn at random for each sequence, of a variant
            that learns by policy gradient; only while training.
    """

    out: Tensor
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: AttentionStats | None = None
    log_prob: Tensor | None = None


class Attention(nn.Module):
    """Base of all variants: build from (config, shape), call with (q, k, v, mask).

    A subclass implements :meth:`forward`, and where it can :meth:`flops` and :meth:`state_size`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AttentionConfig]]
    block_sparse: ClassVar[bool] = False  # whether its calls run :func:`astbench_kernels.block_sparse_attention`

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
            context: Step, whether statistics are wanted, hidden states.
        """
        raise NotImplementedError

    def adopt(self, layer: nn.Module) -> None:
        """Called once, when the module is put into a model, with the backbone's attention layer.

        For variants that start from its projections; the others ignore it.

        Raises:
            CapabilityError: the variant needs projections that this layer does not have.
        """

    def new_cache_state(self) -> CacheState | None:
        """What this variant keeps of one KV cache from call to call, still empty; None for nothing."""
        return None

    def planned_backend(self, device: torch.device) -> str:
        """The kernel that calls on `device` run by these options, in words for the reader of a run's first lines.

        A variant of this package without an option for it computes with torch; what a plugin does, only it knows.
        """
        chosen = getattr(self.config, "backend", "auto")
        if self.block_sparse:
            return f"{choose_backend(chosen, device)} ({'auto' if chosen == 'auto' else 'asked for'})"
        if chosen != "auto":
            return f"{chosen} on {device.type} (asked for)"
        ours = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        return f"{'torch' if ours else 'its own'} on {device.type}"

    def all_pairs(
        self, q: Tensor, k: Tensor, mask: AttentionMask, context: AttentionContext | None, backend: str = "torch"
    ) -> AttentionStats | None:
        """Statistics of an attention that computes every visible pair; None when nobody asks for them."""
        if context is None or not context.collect_stats:
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
