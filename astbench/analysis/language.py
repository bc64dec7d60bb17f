"""What is chosen beside what the tokens are in their language: collected while a model runs, told, and drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from astbench.analysis import tokens
from astbench.analysis.lifts import Lifts, OfKeys, lifts
from astbench.analysis.linguistics import FAMILIES, Tagger, linguistic_classes
from astbench.analysis.watch import Seen

RARITY = "rarity"
EXAMPLES, AROUND = 3, 5
"""Tokens shown of each class, and tokens of text on either side."""


class Language:
    """Tags the sequences, and collects what is chosen of them.

    Args:
        tagger: Knows the words.
        tokenizer: Of the model.
    """

    def __init__(self, tagger: Tagger, tokenizer: Any) -> None:
        self._tagger = tagger
        self._text = tokens.texts_of(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._lifts = Lifts()
        self._texts: list[list[str]] = []
        self._classes: dict[str, list[Tensor]] = {family: [] for family in (*FAMILIES, RARITY)}

    def begin(self, batch: dict[str, Any], counts: Counter[int]) -> None:
        """A batch is about to run.

        Args:
            batch: `input_ids`, and `attention_mask` where there is padding.
            counts: How often each token occurs in everything that is analysed.
        """
        self._lifts.begin(len(batch["input_ids"]))
        valid = batch.get("attention_mask")
        for row, sequence in enumerate(batch["input_ids"].cpu()):
            real = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid[row].cpu().bool()
            ids = sequence[real].tolist()
            texts, special = [self._text(token) for token in ids], [token in self._special for token in ids]
            held = linguistic_classes(texts, special, self._tagger)
            held[RARITY] = tokens.rarity(ids, counts)
            for family, values in held.items():
                found = torch.full(sequence.shape, -1)
                found[real] = torch.tensor(values)
                self._classes[family].append(found)
            whole = [""] * len(sequence)
            for at, text in zip(real.nonzero()[:, 0].tolist(), texts, strict=True):
                whole[at] = text
            self._texts.append(whole)

    def __call__(self, seen: Seen) -> None:
        """A call on these tokens."""
        self._lifts(seen)

    def result(self) -> dict[str, Any]:
        """By family and class what :func:`lifts` says, and examples."""
        names = {**FAMILIES, RARITY: tokens.RARITY}
        families = {}
        for family, classes in self._classes.items():
            found = lifts(self._lifts.keys, classes, names[family])
            for name, said in found.items():
                said["examples"] = self._examples(classes, names[family].index(name))
            families[family] = found
        return {"tagger": self._tagger.about, "sequences": len(self._texts), "families": families}

    def _examples(self, classes: Sequence[Tensor], place: int) -> list[dict[str, Any]]:
        """The tokens of a class that were kept most beside what is expected, of different words.

        Of those that as many rows could see as half of all tokens: one that two rows saw says nothing.
        """
        found = []
        for number, (layers, held) in enumerate(zip(self._lifts.keys, classes, strict=True)):
            if not layers:
                continue
            kept, expected = (_over_layers(layers, part) for part in ("kept", "expected"))
            enough = expected >= expected[expected > 0].median() if bool((expected > 0).any()) else expected > 0
            lift = kept / expected.clamp(min=1e-9)
            at = ((held == place) & enough).nonzero()[:, 0].tolist()
            found += [(float(lift[token]), number, token) for token in at]
        shown: dict[str, dict[str, Any]] = {}
        for lift_of, number, token in sorted(found, reverse=True):
            text = self._texts[number][token]
            if text not in shown:
                shown[text] = {"text": self._around(number, token), "lift": round(lift_of, 3)}
            if len(shown) == EXAMPLES:
                break
        return list(shown.values())

    def _around(self, number: int, token: int) -> str:
        """The token in its text, in double angle brackets."""
        texts = self._texts[number]
        text = texts[token]
        blank = text[: len(text) - len(text.lstrip())]
        before = "".join(texts[max(0, token - AROUND) : token])
        after = "".join(texts[token + 1 : token + 1 + AROUND])
        return f"{before}{blank}«{text.strip() or 'line break'}»{after}".replace("\n", " / ").strip()


def _over_layers(layers: dict[str, OfKeys], part: str) -> Tensor:
    return torch.stack([getattr(one, part) for one in layers.values()]).sum(0)


def told(found: dict[str, Any], most: int = 3) -> list[tuple[str, str]]:
    """The classes that are kept most and least beside others at their distances, whose interval leaves out 1.

    Returns: pairs of a class and what is said of it; one that says so where there is none.
    """
    sure = [
        (said["kept"], f"{family}: {name}", said["examples"])
        for family, classes in found["families"].items()
        for name, said in classes.items()
        if said["kept"][1] is not None and not said["kept"][1] <= 1 <= said["kept"][2]
    ]
    if not sure:
        return [("language", "no class of tokens is kept more or less than others at its distances, beyond chance")]
    sure.sort(key=lambda one: -one[0][0])
    chosen = sure if len(sure) <= 2 * most else [*sure[:most], *sure[-most:]]
    lines = []
    for (lift, low, high), name, examples in chosen:
        example = f", as in {examples[0]['text']!r}" if examples else ""
        lines.append((name, f"kept {lift:.2f} times as often ({low:.2f} to {high:.2f}){example}"))
    return lines
