"""Block summaries beside a Hugging Face KV cache: found again at the next step, or made anew when in doubt."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from astbench_registry.block_summaries import BlockSummaries


class _Kept(NamedTuple):
    """Summaries, whose they are, and the tensor of keys that they were made of, as it was then."""

    summaries: BlockSummaries
    watch: weakref.ref[CacheWatch]
    keys: weakref.ref[Tensor]
    version: int


_kept: weakref.WeakKeyDictionary[DynamicLayer | StaticLayer, _Kept] = weakref.WeakKeyDictionary()


class CacheWatch:
    """Of one attention module: looks at the cache before the module appends to it, and after.

    A cache holds its keys in a tensor that beam search, selecting sequences, cropping and resetting replace. As long as
    it is the very tensor that the last call left, unchanged, the summaries made of it hold; otherwise they are
    forgotten (so beam search makes them anew at every step). Only for the two kinds of layers whose tensors are what
    attention reads, and without gradients.
    """

    def __init__(self, *, cross: bool) -> None:
        self._cross = cross
        self._cache: Cache | None = None
        self._index = 0
        self._found: BlockSummaries | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the attention module."""
        self._cache = self._found = None
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = next((x for x in args if isinstance(x, Cache)), None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if self._cross else cache.self_attention_cache
        index = getattr(module, "layer_idx", None)
        if not isinstance(cache, Cache) or index is None or torch.is_grad_enabled():
            return
        self._cache, self._index = cache, index
        layer, keys = self._layer()
        known = None if layer is None else _kept.get(layer)
        if keys is None or known is None or known.watch() is not self or known.keys() is not keys:
            return
        if known.version == _version(keys):
            self._found = known.summaries

    def summaries(self, keys: Tensor) -> BlockSummaries | None:
        """Those of the cache that these keys, already appended to, belong to; None where none are kept."""
        if self._layer()[1] is not keys:
            return None
        return BlockSummaries() if self._found is None else self._found

    def after(self, summaries: BlockSummaries | None) -> None:
        """Remember what the call has added to."""
        layer, keys = self._layer()
        if summaries is not None and layer is not None and keys is not None:
            _kept[layer] = _Kept(summaries, weakref.ref(self), weakref.ref(keys), _version(keys))
        self._cache = self._found = None

    def _layer(self) -> tuple[DynamicLayer | StaticLayer | None, Tensor | None]:
        """The cache's layer, and its keys if it has any; None for another kind of layer, and without a cache."""
        if self._cache is None or self._index >= len(self._cache.layers):
            return None, None
        layer = self._cache.layers[self._index]
        if type(layer) is not DynamicLayer and type(layer) is not StaticLayer:
            return None, None
        return layer, layer.keys if layer.is_initialized else None


def _version(tensor: Tensor) -> int:
    """Counts changes in place; of tensors made in inference mode nobody counts them."""
    return 0 if tensor.is_inference() else tensor._version
