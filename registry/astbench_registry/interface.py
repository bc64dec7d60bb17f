"""The one interface of every attention: called after the backbone's projections and position encoding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from astbench_kernels import choose_backend
from astbench_registry.budget import ShareCounts
from astbench_registry.capabilities import AttentionConfig
from astbench_registry.context import AttentionContext, AttentionOutput, AttentionStats, CacheState, ExplicitWeights
from astbench_registry.errors import CapabilityError
from astbench_registry.leading_padding import leading_padding, without_leading_padding
from astbench_registry.mask import AttentionMask

__all__ = [
    "Attention",
    "AttentionContext",
    "AttentionOutput",
    "AttentionShape",
    "AttentionStats",
    "CacheState",
    "ExplicitWeights",
]

WEIGHTS_AT_A_TIME = 2**20
"""Explicit weights that are held together: 4 MiB in float32, which a core's cache holds."""


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
        self._can = config.can  # asked for at every call

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """:meth:`forward`, given what the variant can take as it is.

        Unless `capabilities.any_value_size` is set, narrower values are padded with zeros to the keys' size, and the
        output is cut. Unless `shift_invariant` is, it is called with no padding in front, so that it may count blocks,
        strides and positions from row 0; see :mod:`astbench_registry.leading_padding`. Where the context brings a
        transform, values are summed by :meth:`explicit_weights` that it has changed, in place of :meth:`forward`.
        """
        can, narrow = self._can, q.shape[-1] - v.shape[-1]
        if narrow > 0 and not can.any_value_size:
            output = self(q, k, pad(v, (0, narrow)), mask, scale=scale, context=context)
            return output._replace(out=output.out[..., :-narrow])
        run: Callable[..., AttentionOutput] = super().__call__
        if context is not None and context.transform is not None:
            run = self._transformed
        leading = None if can.shift_invariant else leading_padding(mask.key_valid)
        if leading is None:
            output = run(q, k, v, mask, scale=scale, context=context)
            return output
        context = context or AttentionContext()
        return without_leading_padding(run, self.new_cache_state, q, k, v, mask, leading, scale, context)

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
            v: `(batch, num_kv_heads, key_length, value_dim)`; value_dim is head_dim unless the capability record says
                `any_value_size`.
            mask: What may be seen. Nothing in it may be ignored.
            scale: Factor on q . k; 1/sqrt(head_dim) by default.
            context: Step, whether statistics are wanted, hidden states.
        """
        raise NotImplementedError

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
        """The weights by which :meth:`forward` sums values outside of training, for transforms of them.

        Arguments as there. Only for variants whose capability record says `yields_probabilities`.
        """
        raise NotImplementedError(f"attention '{self.name}' declares yields_probabilities and gives no weights")

    def _transformed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """Values summed by transformed explicit weights, some rows at a time. O(N M) time."""
        assert context is not None and context.transform is not None
        if not self.config.can.yields_probabilities:
            raise CapabilityError(f"attention '{self.name}' with these options yields no weights to transform")
        with torch.autocast(q.device.type, enabled=False):
            found = self.explicit_weights(q, k, v, mask, scale=scale, context=context)
            values = mask.without_padding(q, k, v if found.values is None else found.values)[2]
            parts, length, keys = [], q.shape[2], k.shape[2]
            for rows in torch.arange(length, device=q.device).split(
                max(1, WEIGHTS_AT_A_TIME // max(1, q.shape[0] * q.shape[1] * keys))
            ):
                weights = context.transform(found.rows(rows), mask.visible_rows(rows, length, keys, q.shape[0]))
                grouped = weights.unflatten(1, (values.shape[1], -1))  # (batch, kv_heads, heads each, rows, keys)
                parts.append((grouped @ values.to(weights.dtype)[:, :, None]).flatten(1, 2).to(q.dtype))
        stats = None if found.stats is None else replace(found.stats, backend=f"explicit-{q.device.type}")
        return AttentionOutput(torch.cat(parts, 2) if parts else q.new_empty(*q.shape[:3], v.shape[-1]), stats=stats)

    def adopt(self, layer: nn.Module) -> None:
        """Called once, when the module is put into a model, with the backbone's attention layer.

        For variants that start from its projections; the others ignore it.

        Raises:
            CapabilityError: the variant needs projections that this layer does not have.
        """

    def observe(self, q: Tensor, k: Tensor, mask: AttentionMask) -> None:
        """Look at the queries and keys of a dense call of the layer that it stands in, before :meth:`start`.

        For variants that start from the model's own queries and keys; the others look away.

        Args:
            q: As for :meth:`forward`.
            k: Likewise.
            mask: Likewise.
        """

    def start(self) -> bool:
        """Take what was observed as the start of the variant's own parameters; whether any of them start from it."""
        return False

    def forget(self) -> None:
        """Let go of what was observed: nothing is to start from it."""

    @property
    def budget_is_calibrated(self) -> bool:
        """Whether this layer keeps what reaches a threshold that is found by what it lets through.

        Such variants have `share` and fill in :meth:`count_shares` and :meth:`set_share`; of others nobody asks for it.
        """
        return False

    def count_shares(self, counts: ShareCounts | None) -> None:
        """Add to `counts` what calls could keep from here on, until called with None."""
        raise NotImplementedError

    @property
    def share(self) -> Tensor | float:
        """The least share that is kept."""
        raise NotImplementedError

    def set_share(self, share: float) -> None:
        """Keep, from here on, what has at least this share."""
        raise NotImplementedError

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

    def some_pairs(
        self,
        q: Tensor,
        k: Tensor,
        mask: AttentionMask,
        context: AttentionContext | None,
        pattern: Tensor,
        backend: str = "torch",
    ) -> AttentionStats | None:
        """Statistics of an attention that computes the visible pairs of a pattern; None when nobody asks for them.

        Args:
            q: Queries.
            k: Keys.
            mask: What may be seen; pairs that it hides are not counted.
            context: Whether statistics are wanted.
            pattern: Bool, broadcastable to `(batch, num_heads, query_length, key_length)`: True where a pair is
                computed, whatever the mask hides.
            backend: What computed it.
        """
        if context is None or not context.collect_stats:
            return None
        seen = mask.dense(q.shape[2], k.shape[2], q.device)
        pairs = pattern if seen is None else pattern & seen
        pairs = pairs[(None,) * (4 - pairs.dim())].expand(-1, -1, q.shape[2], k.shape[2])
        attended = pairs.count_nonzero((2, 3)).double().expand(q.shape[:2])
        return AttentionStats(attended, mask.visible_pairs(q, k), backend)

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
