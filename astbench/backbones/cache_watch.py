"""Block summaries beside a Hugging Face KV cache: found again at the next step, or made anew when in doubt."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from astbench_registry.interface import Attention, CacheState

Layer = DynamicLayer | StaticLayer


class _Mark:
    """A tensor as it is now; it is not kept alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), _version(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        """The very same tensor, not changed in place since."""
        return self._tensor() is tensor and self._version == _version(tensor)


class _Kept:
    """Summaries, and everything that they were made of: the cache's tensors, the slot, its weights, the dtype."""

    def __init__(self, summaries: CacheState, slot: nn.Module, dtype: torch.dtype, cached: list[Tensor]) -> None:
        self.summaries, self.dtype = summaries, dtype
        self._slot = weakref.ref(slot)
        self._cached, self._weights = ([_Mark(x) for x in xs] for xs in (cached, slot.parameters()))

    def now_of(self, cached: list[Tensor]) -> None:
        """The cache has grown; slot and weights have just been looked at."""
        self._cached = [_Mark(x) for x in cached]

    def made_by(self, slot: nn.Module) -> bool:
        """The slot and its weights are what they were; the dtype shows later."""
        return self._slot() is slot and _are_still(self._weights, [*slot.parameters()])

    def holds(self, cached: list[Tensor]) -> bool:
        """The cache is as it was."""
        return _are_still(self._cached, cached)


def _are_still(marks: list[_Mark], now: list[Tensor]) -> bool:
    return len(now) == len(marks) and all(mark.is_still(x) for mark, x in zip(marks, now, strict=True))


@dataclass
class _Append:
    """An attention module is about to append to a cache."""

    slot: nn.Module
    cache: weakref.ref[Cache]
    index: int
    cross: bool
    found: _Kept | None


class _Current(threading.local):
    call: _Append | None = None


_kept: weakref.WeakKeyDictionary[Layer, _Kept] = weakref.WeakKeyDictionary()
_current = _Current()


def watch_cache(
    slot: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, cross: bool
) -> None:
    """Look at the cache before a call of a Hugging Face attention module that holds a slot.

    A cache holds keys and values in tensors that beam search, selecting sequences, cropping and resetting replace. As
    long as they are the very tensors that the last call left, unchanged, the summaries made of them hold; otherwise
    they are told so (:meth:`CacheState.doubt`), and what they cannot verify is made anew, at every step of beam search.
    Only for the two kinds of layers whose tensors are what attention reads, and without gradients. In inference mode
    nobody counts changes in place: there only a cache that grows by new tensors is trusted, so whoever writes into such
    a cache by hand starts a new one.

    Args:
        slot: Which will ask for the summaries.
        module: Which is called.
        args: With what.
        kwargs: With what else.
        cross: It attends to another sequence.
    """
    _current.call = None
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = next((x for x in args if isinstance(x, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if cross else cache.self_attention_cache
    index = getattr(module, "layer_idx", None)
    if isinstance(cache, Cache) and index is not None and not torch.is_grad_enabled():
        layer, found = _layer(cache, index), None
        if layer is not None:
            known = _kept.get(layer)
            if known is not None and known.made_by(slot):
                found = known
                if not known.holds(_tensors(layer)):
                    known.summaries.doubt()
        _current.call = _Append(slot, weakref.ref(cache), index, cross, found)


@contextmanager
def kept_summaries(
    slot: nn.Module, attention: Attention, keys: Tensor, values: Tensor, dtype: torch.dtype
) -> Iterator[CacheState | None]:
    """Summaries of the cache that these keys and values, already appended to, belong to; None where none are kept.

    What a call within adds to them is remembered, unless it raises.

    Args:
        slot: Where the call is made.
        attention: The variant in it.
        keys: As the cache returned them.
        values: Likewise.
        dtype: In which the call is made.
    """
    call, _current.call = _current.call, None
    cache = None if call is None or call.slot is not slot else call.cache()
    layer = None if call is None or cache is None else _layer(cache, call.index)
    if call is None or layer is None or layer.keys is not keys or layer.values is not values:
        yield None
        return
    if keys.is_inference() and (call.cross or type(layer) is not DynamicLayer):
        yield None
        return
    _kept.pop(layer, None)
    found = call.found if call.found and call.found.dtype == dtype else None
    summaries = found.summaries if found else attention.new_cache_state()
    if summaries is None:
        yield None
        return
    yield summaries
    if found:
        found.now_of([keys, values])
    _kept[layer] = found or _Kept(summaries, slot, dtype, [keys, values])


def _layer(cache: Cache, index: int) -> Layer | None:
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer if type(layer) is DynamicLayer or type(layer) is StaticLayer else None


def _tensors(layer: Layer) -> list[Tensor]:
    return [x for x in (layer.keys, layer.values) if x is not None] if layer.is_initialized else []


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
