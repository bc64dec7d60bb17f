"""A transform of attention weights at work in a swapped model: in which layers, from which values, what it left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from astbench.backbones.hooks import AttentionSlot
from astbench.errors import ConfigError
from astbench_registry.transforms.applied import AppliedTransform
from astbench_registry.transforms.registry import build_transform, make_transform_config, require_probabilities
from astbench_registry.transforms.values import ValueCounts


class Transforming:
    """Puts a transform on the slots of a swapped model; set it as `handle.transforming`.

    >>> handle.transforming = Transforming(handle.slots, "log3bit", {"bits": 4})  # doctest: +SKIP

    Args:
        slots: Of the swapped model.
        name: Registered transform.
        options: Its options as plain data.

    Raises:
        ValueError: an option, a value or a layer that does not exist.
        CapabilityError: an attention that yields no probabilities, with those that do.
    """

    def __init__(self, slots: Sequence[AttentionSlot], name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.config = make_transform_config(name, options)
        attention = slots[0].attention
        require_probabilities(
            attention.name, able=attention.config.can.yields_probabilities, what=f"--transform={name}"
        )
        chosen, last = self.config.layers, max(slot.attention.shape.num_layers for slot in slots) - 1
        if chosen is not None and max(chosen) > last:
            raise ConfigError(f"--transform.layers names layer {max(chosen)}, and the model has layers 0 to {last}")
        self.slots = [s for s in slots if chosen is None or s.attention.shape.layer_index in chosen]
        self.applied: dict[str, AppliedTransform] = {}
        for slot in self.slots:
            shape = slot.attention.shape
            self.applied[slot.path] = AppliedTransform(build_transform(name, self.config, shape), shape.num_heads)
            slot.transform = self.applied[slot.path]
        self.started = not self.config.calibrated

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Inside, weights stay as they are and their values are counted; then the transform starts from them."""
        counts = {path: ValueCounts(slot.attention.shape.num_heads) for path, slot in self._by_path()}
        wanting = [slot for slot in self.slots if slot.collect_stats]
        for slot in wanting:  # what is computed to find thresholds is no part of what is evaluated
            slot.collect_stats = False
        for path, applied in self.applied.items():
            applied.calibrating = counts[path]
        try:
            yield
        finally:
            for applied in self.applied.values():
                applied.calibrating = None
            for slot in wanting:
                slot.collect_stats = True
        everywhere = ValueCounts.sum(list(counts.values()))
        for path, applied in self.applied.items():
            assert applied.transform is not None
            applied.transform.start(counts[path], everywhere)
        self.started = True

    def _by_path(self) -> list[tuple[str, AttentionSlot]]:
        return [(slot.path, slot) for slot in self.slots]

    def count(self, counting: bool) -> None:
        """From here on what is left of the weights is counted, or no longer."""
        for applied in self.applied.values():
            applied.counting = counting

    def facts(self) -> dict[str, Any]:
        """What each layer's transform has to say of itself, such as thresholds that were found, by path."""
        found = {path: applied.transform.facts() for path, applied in self.applied.items() if applied.transform}
        return {path: facts for path, facts in found.items() if facts}


@contextmanager
def watching_values(slots: Sequence[AttentionSlot]) -> Iterator[dict[str, ValueCounts]]:
    """Inside, the values of every layer's weights are counted by head, after a transform where there is one.

    Raises:
        CapabilityError: an attention that yields no probabilities, with those that do.
    """
    attention = slots[0].attention
    require_probabilities(attention.name, able=attention.config.can.yields_probabilities, what="analyze --values")
    counts = {slot.path: ValueCounts(slot.attention.shape.num_heads) for slot in slots}
    before = [slot.transform for slot in slots]
    for slot in slots:
        if slot.transform is None:
            slot.transform = AppliedTransform(None, slot.attention.shape.num_heads)
        slot.transform.watching = counts[slot.path]
    try:
        yield counts
    finally:
        for slot, applied in zip(slots, before, strict=True):
            assert slot.transform is not None
            slot.transform.watching = None
            slot.transform = applied
