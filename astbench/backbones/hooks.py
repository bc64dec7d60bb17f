"""The two functions that transformers calls in place of its own attention and mask, and the slot they look for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils import logging

from astbench.backbones.cache_watch import kept_summaries, watch_cache
from astbench.backbones.side_by_side import NewTokens
from astbench_registry import CapabilityError, Pattern, build_attention
from astbench_registry.interface import (
    Attention,
    AttentionContext,
    AttentionOutput,
    AttentionShape,
    AttentionStats,
    CacheState,
)
from astbench_registry.mask import AttentionMask
from astbench_registry.transforms.applied import AppliedTransform

logger = logging.get_logger(__name__)

IMPLEMENTATION = "astbench"
"""The name under which the hooks are registered with transformers."""

_REFUSED = {
    "sliding_window": "a built-in sliding window",
    "softcap": "logit soft-capping",
    "position_bias": "an additive position bias (T5)",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
}


class UnsupportedMask:
    """Stands for a mask that :class:`AttentionMask` cannot hold."""


@dataclass(frozen=True)
class CarriedMask(AttentionMask):
    """A mask that transformers may carry about as it does tensors: generation with a static cache makes it early."""

    ndim: ClassVar[int] = 0

    def contiguous(self) -> CarriedMask:
        """Itself."""
        return self

    def view(self, *shape: int) -> CarriedMask:
        """Itself: GPT-2 flattens whatever it is given."""
        return self


class AttentionSlot(nn.Module):
    """Sits on a Hugging Face attention module as its submodule `astbench` and holds the variant.

    While `observing` is set, dense attention runs and the variant only looks on.
    """

    def __init__(self, attention: Attention, pattern: Pattern, path: str) -> None:
        super().__init__()
        self.attention = attention
        self.pattern: Pattern = pattern
        self.path = path
        self.step = 0
        self.collect_stats = False
        self.hidden_states: Tensor | None = None
        self.global_tokens: Tensor | None = None
        self.losses: Mapping[str, Tensor] = {}
        self.stats: AttentionStats | None = None
        self.log_prob: Tensor | None = None
        self.observing = False
        self.transform: AppliedTransform | None = None
        self._ran_without_gradient = False

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        scale: float | None,
        summaries: CacheState | None = None,
    ) -> Tensor:
        """Run the variant; keep what it reports for the handle."""
        if mask.causal != (self.pattern == "causal_self"):
            raise CapabilityError(
                f"{self.path} was attached for {self.pattern} attention but is called with a "
                f"{'causal' if mask.causal else 'non-causal'} mask"
            )
        if mask.pattern != self.pattern:
            mask = replace(mask, pattern=self.pattern)
        if self.observing:
            self.attention.observe(q, k, mask)
            return _dense(q, k, v, mask, scale)
        context = AttentionContext(
            self.step, self.collect_stats, self.hidden_states, self.global_tokens, summaries, self.transform
        )
        try:
            output = self.attention(q, k, v, mask, scale=scale, context=context)
        except Exception as error:
            error.add_note(f"raised by attention '{self.attention.name}' at {self.path}")
            raise
        wanted = (*q.shape[:3], v.shape[-1])
        shape = tuple(output.out.shape) if isinstance(output, AttentionOutput) else type(output).__name__
        if shape != wanted:
            raise CapabilityError(
                f"{type(self.attention).__name__} must return an AttentionOutput with an output (batch, num_heads, "
                f"query_length, head_dim) = {wanted}, got {shape}"
            )
        # A graph task has a number while a backward pass runs; torch.utils.checkpoint asks in the same way.
        in_backward = torch._C._current_graph_task_id() != -1
        self._refuse_lost_losses(output, in_backward)
        if not in_backward:  # else checkpointing repeats the layer: its second losses would keep all of its graph alive
            _, self.losses, self.stats, self.log_prob = output
        return output.out

    def _refuse_lost_losses(self, output: AttentionOutput, in_backward: bool) -> None:
        """Reentrant checkpointing runs layers without gradients first: their losses come after `losses()` was read."""
        repeated = self._ran_without_gradient and torch.is_grad_enabled()
        self._ran_without_gradient = self.training and not torch.is_grad_enabled()
        if repeated and in_backward and (output.losses or output.log_prob is not None):
            raise CapabilityError(
                f"reentrant checkpointing loses the losses of attention '{self.attention.name}' ({self.path}): use "
                'model.gradient_checkpointing_enable({"use_reentrant": False})'
            )


@dataclass(frozen=True)
class RecordedCall:
    """What one attention module was called with in the probing pass."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    pattern: Pattern


PROBE_LENGTHS = (8, 5)
"""Encoder and decoder lengths of a probing pass: different, so that cross-attention shows."""

_calls: list[RecordedCall] | None = None

LEFT_OUT = "astbench_left_out"
"""Attribute of attention modules of a swapped model that were not chosen, and run dense."""


@contextmanager
def recorded_calls() -> Iterator[list[RecordedCall]]:
    """Within, every call of the interface is written down; inputs must have `PROBE_LENGTHS`."""
    global _calls
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewTokens,
    value: Tensor | NewTokens,
    attention_mask: AttentionMask | UnsupportedMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in place of its own attention.

    Raises:
        CapabilityError: the model asks for something that would be silently lost.
    """
    asked = [why for name, why in _REFUSED.items() if kwargs.get(name) is not None]
    if dropout:
        asked.append(f"attention dropout {dropout}")
    if asked:
        raise CapabilityError(f"{type(module).__name__} asks for {' and '.join(asked)}, which no variant honours")
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "a swapped attention builds no matrix of weights: output_attentions stays empty, as with sdpa; "
            "handle.collecting_stats() tells which key blocks each layer used"
        )
    if isinstance(key, NewTokens) or isinstance(value, NewTokens):
        assert isinstance(key, NewTokens), "a cache that lets sequences stand side by side gives it twice"
        _as_mask(module, query, key.keys, attention_mask)  # refuses what no sequence could be given
        return _one_by_one(module, query, key, scaling), None
    cached = key, value
    if torch.is_autocast_enabled(query.device.type):
        # Rotary positions leave queries and keys in float32; torch's own attention casts all three as well.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = _as_mask(module, query, key, attention_mask)
    if _calls is not None:
        pattern = mask.pattern
        if query.shape[2] == PROBE_LENGTHS[1] and key.shape[2] == PROBE_LENGTHS[0]:
            pattern = "causal_cross"
        _calls.append(RecordedCall(module, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], pattern))
    slot = getattr(module, IMPLEMENTATION, None)
    if slot is None and _calls is None and not hasattr(module, LEFT_OUT):
        raise CapabilityError(
            f"attn_implementation='{IMPLEMENTATION}' alone attaches no attention to {type(module).__name__}: load the "
            "model with attn_implementation='sdpa', then call astbench.swap_attention(model, NAME, OPTIONS)"
        )
    if slot is None:
        out = _dense(query, key, value, mask, scaling)
    else:
        with kept_summaries(slot, slot.attention, *cached, key.dtype) as summaries:
            out = slot(query, key, value, mask, scaling, summaries)
    return out.transpose(1, 2).contiguous(), None


def _one_by_one(module: nn.Module, query: Tensor, new: NewTokens, scaling: float | None) -> Tensor:
    """Each sequence's own attention over its own cache; `(sequences, 1, num_heads, value_dim)`."""
    slot: AttentionSlot | None = getattr(module, IMPLEMENTATION, None)
    hidden = None if slot is None else slot.hidden_states
    outputs = []
    for row, cache in enumerate(new.caches):
        one = slice(row, row + 1)
        if slot is not None:
            slot.hidden_states = None if hidden is None else hidden[one]
            watch_cache(slot, module, (), {"past_key_values": cache}, cross=False)
        key, value = new.append(row)
        mask = AttentionMask("causal_self", query_offset=key.shape[2] - query.shape[2])
        outputs.append(attention_forward(module, query[one], key, value, mask, scaling)[0])
    return torch.cat(outputs)


def _as_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: AttentionMask | UnsupportedMask | None
) -> AttentionMask:
    if isinstance(mask, AttentionMask):
        return mask
    if isinstance(mask, UnsupportedMask):
        raise CapabilityError(
            f"{type(module).__name__} asks for a packed, sliding-window or otherwise special mask, which no variant "
            "honours; choose a model, or a configuration of it, with full attention in every layer"
        )
    if mask is not None:
        raise CapabilityError(
            f"{type(module).__name__} passes a ready-made {type(mask).__name__} as its mask; only padding masks "
            "(batch, length) are supported"
        )
    if getattr(module, "is_causal", False) and query.shape[2] == key.shape[2]:
        raise CapabilityError(f"{type(module).__name__} is causal but passes no mask; it would see the future")
    return AttentionMask("bidirectional_self")


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None) -> Tensor:
    """Layers that nothing is attached to; of cross-attention too, where the keys' padding says nothing of queries."""
    if mask.key_valid is not None:
        mask = replace(mask, query_valid=mask.key_valid.new_ones(q.shape[0], q.shape[2]))
    shape = AttentionShape(q.shape[1], k.shape[1], q.shape[-1])
    return build_attention("dense", {}, shape)(q, k, v, mask, scale=scale).out


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    **kwargs: Any,
) -> AttentionMask | UnsupportedMask:
    """The function that transformers calls to build a mask: O(batch x length) instead of N x M.

    Packed sequences, sliding windows and other masks that this form cannot hold come back as
    :class:`UnsupportedMask`, which the attention refuses.
    """
    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    patterns: dict[Any, Pattern] = {
        causal_mask_function: "causal_self",
        bidirectional_mask_function: "bidirectional_self",
    }
    if mask_function not in patterns or kv_offset:
        # Some models build masks that none of their layers uses: refuse when one is used.
        return UnsupportedMask()
    valid = attention_mask
    if valid is not None:
        valid = valid[:, :kv_length].bool()
        # A static cache has room for more keys than the padding mask speaks of.
        valid = nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
        if bool(valid.all()):
            valid = None
    return CarriedMask(patterns[mask_function], query_offset=int(q_offset), key_valid=valid)


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
