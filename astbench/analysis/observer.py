"""Adds up facts over layers, heads and batches while a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from astbench.analysis.explorer import Explorer
from astbench.analysis.rows import DISTANCES, RowFacts, overlap, seen_blocks
from astbench.analysis.tokens import FAMILIES, classes, texts_of
from astbench.analysis.watch import Seen, watching_choices
from astbench.backbones.hooks import AttentionSlot
from astbench.runs.picture import layer_name
from astbench.training.module import TaskModule
from astbench_kernels import BlockLayout
from astbench_registry.block_selection import Call

PLACES = 10
"""Parts of a sequence, from its first token to its last."""


class Sums:
    """Means that grow: sums and counts by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, count: Tensor | float) -> None:
        """Sums along what is left of the axes, and how many values each is the sum of."""
        count = torch.as_tensor(count, dtype=torch.float64).expand(values.shape)
        values = values.double().cpu()
        self._sums[name] = self._sums[name] + values if name in self._sums else values
        self._counts[name] = self._counts[name] + count.cpu() if name in self._counts else count.cpu().clone()

    def mean(self, name: str) -> Any:
        """The means as plain numbers, None where nothing was counted."""
        if name not in self._sums:
            return None
        means = self._sums[name] / self._counts[name]
        found: list[Any] | float = means.tolist()
        return _no_nan(found)

    def names(self) -> list[str]:
        """What was added to."""
        return list(self._sums)


def _no_nan(found: Any) -> Any:
    if isinstance(found, list):
        return [_no_nan(one) for one in found]
    return None if found != found else round(found, 6)


class Observer:
    """Watches every attention of a model that chooses blocks.

    Args:
        module: In a trainer, its model built.
        rows: Query rows looked at in each sequence, spread evenly.
        also: Who else looks at the calls on the input's tokens.
    """

    def __init__(self, module: TaskModule, rows: int, also: Callable[[Seen], None] | None = None) -> None:
        self._module, self._rows, self._also = module, rows, also
        self.layers: dict[str, Sums] = {}
        self.all = Sums()
        self.sequences = self.queries = 0
        self._classes: dict[str, Tensor] = {}  # family -> int64 (batch, tokens), -1 in padding
        self._tokenizer = module.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        self._text = texts_of(self._tokenizer)
        self._before: dict[str, Tensor] = {}  # what the last layer of each stack chose
        self.explorer: Explorer | None = None  # of the first sequence
        self._first_batch = True

    def watching(self) -> AbstractContextManager[None]:
        """Within, every call counts. Raises as :func:`watching_choices`."""
        return watching_choices(self._module, self._rows, self._seen)

    def begin(self, batch: dict[str, Any], counts: Counter[int]) -> None:
        """A batch is about to run.

        Args:
            batch: On the model's device.
            counts: How often each token occurs in everything that is analysed.
        """
        self._before = {}
        ids = batch["input_ids"]
        self.sequences += len(ids)
        valid = batch.get("attention_mask")
        self._first_batch = self.explorer is None
        if self.explorer is None:
            texts = [self._text(token) for token in ids[0].tolist()]
            apart = any(" " in text for text in texts)  # else numbers, say, would run into one another
            self.explorer = Explorer(texts if apart else [f"{text} " for text in texts])
        special = set(self._tokenizer.all_special_ids)
        found = {family: torch.full(ids.shape, -1) for family in FAMILIES}
        for row, sequence in enumerate(ids.cpu()):
            real = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid[row].cpu().bool()
            held = classes(sequence[real].tolist(), counts, self._text, special)
            for family, values in held.items():
                found[family][row, real] = torch.tensor(values)
        self._classes = {family: table.to(ids.device) for family, table in found.items()}

    def _seen(self, seen: Seen) -> None:
        self._add(seen.slot, seen.facts, seen.of_input)
        self._add_neighbours(seen.slot.path, seen.call, seen.layout, seen.rows, seen.facts)
        if seen.of_input:
            self._add_tokens(seen.facts, seen.rows)
            if self._first_batch and self.explorer is not None:
                self.explorer.add(seen.slot.path, seen.facts, seen.rows, seen.layout.block_size)
        if self._also is not None and seen.of_input:
            self._also(seen)

    def _add(self, slot: AttentionSlot, facts: RowFacts, of_input: bool) -> None:
        first = not self.layers or next(iter(self.layers)) == slot.path
        layer = self.layers.setdefault(slot.path, Sums())
        self.queries += int(facts.real.sum()) if first else 0
        real = facts.real[:, None]
        for name in ("kept", "mass", "best", "bits"):
            values = getattr(facts, name) * real
            layer.add(name, values.sum((0, 2)), real.sum().item())
            if not of_input:
                continue
            place = (facts.place * PLACES).long().clamp(max=PLACES - 1)
            of_rows = values.mean(1)
            sums = of_rows.new_zeros(PLACES).index_add_(0, place.flatten(), of_rows.flatten())
            counts = of_rows.new_zeros(PLACES).index_add_(0, place.flatten(), facts.real.float().flatten())
            self.all.add(f"{name}_by_place", sums, counts.double())
        self._add_known(layer, "overlap_of_heads", facts.heads, facts.real)
        if slot.pattern.endswith("_cross"):
            return
        seen = facts.seen_by_distance
        for sums in (layer, self.all) if of_input else (layer,):
            sums.add("kept_by_distance", facts.kept_by_distance.mean(0), seen.cpu())
            sums.add("mass_by_distance", facts.mass_by_distance.mean(0), facts.real.sum().item())

    @staticmethod
    def _add_known(layer: Sums, name: str, values: Tensor, real: Tensor) -> None:
        known = real & ~values.isnan()
        layer.add(name, values.where(known, 0.0).sum(), known.sum().item())

    def _add_neighbours(self, path: str, call: Call, layout: BlockLayout, rows: Tensor, facts: RowFacts) -> None:
        """Overlap with the next token's blocks, and with those of the layer before."""
        layer = self.layers[path]
        last = call.q.shape[2] - 1
        beside = seen_blocks(call, layout, (rows + 1).clamp(max=last))
        apart = facts.real & (rows < last)
        shared = overlap(facts.chosen, beside).nanmean(1)
        self._add_known(layer, "overlap_of_neighbours", shared, apart)
        stack = layer_name(path).rpartition(" ")[0]  # "decoder layer", "cross layer"
        before, self._before[stack] = self._before.get(stack), facts.chosen
        if before is not None and before.shape == facts.chosen.shape:
            either, other = facts.chosen.any(1), before.any(1)
            self._add_known(layer, "overlap_of_layers", overlap(either, other), facts.real)

    def _add_tokens(self, facts: RowFacts, rows: Tensor) -> None:
        for family, table in self._classes.items():
            if table.shape[1] != facts.seen_of_key.shape[1]:
                return  # an encoder's tokens, while the decoder runs
            names = len(FAMILIES[family])
            for part, of, count in (
                ("query_kept", facts.kept.mean(1), facts.real.double()),
                ("query_mass", facts.mass.mean(1), facts.real.double()),
                ("query_bits", facts.bits.mean(1), facts.real.double()),
                ("key_kept", facts.kept_of_key.mean(1), facts.seen_of_key),
            ):
                held = table[:, rows] if part.startswith("query") else table
                known = held >= 0
                weight = (of.double() * (facts.real if part.startswith("query") else 1.0))[known]
                into = weight.new_zeros(names).index_add_(0, held[known], weight)
                counted = weight.new_zeros(names).index_add_(0, held[known], count[known])
                self.all.add(f"{family}.{part}", into, counted)
            known = table >= 0
            mass = facts.mass_of_key.mean(1)[known]
            self.all.add(f"{family}.key_mass", mass.new_zeros(names).index_add_(0, table[known], mass), mass.sum())
            number = torch.ones_like(mass)
            self.all.add(f"{family}.share", mass.new_zeros(names).index_add_(0, table[known], number), number.sum())

    def result(self) -> dict[str, Any]:
        """Everything as plain data."""
        layers = {path: {name: sums.mean(name) for name in sums.names()} for path, sums in self.layers.items()}
        tokens = {
            family: {
                name: {part: _at(self.all.mean(f"{family}.{part}"), number) for part in PARTS}
                for number, name in enumerate(names)
            }
            for family, names in FAMILIES.items()
            if f"{family}.share" in self.all.names() and sum(share > 0 for share in self._shares(family)) > 1
        }
        last = max((i for i, kept in enumerate(self._by_distance()) if kept is not None), default=-1) + 1
        return {
            "sequences": self.sequences,
            "queries": self.queries,
            "distances": [0, *(2**i for i in range(DISTANCES - 1))][:last],
            "kept_by_distance": self._by_distance()[:last],
            "mass_by_distance": (self.all.mean("mass_by_distance") or [])[:last],
            "by_place": {name: self.all.mean(f"{name}_by_place") for name in ("kept", "mass", "best", "bits")},
            "by_token": tokens,
            "layers": layers,
        }

    def _by_distance(self) -> list[float | None]:
        return self.all.mean("kept_by_distance") or []

    def _shares(self, family: str) -> list[float]:
        return self.all.mean(f"{family}.share") or []


PARTS = ("share", "query_kept", "query_mass", "query_bits", "key_kept", "key_mass")
"""Of a class of tokens: its share of all; as queries what they keep, which mass that holds and their entropy; as keys
how often they are kept by rows that could see them, and their share of the mass."""


def _at(values: Any, number: int) -> float | None:
    return values[number] if isinstance(values, list) else None
