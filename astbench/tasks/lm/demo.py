"""Generated articles that name places and people early and again much later. Imports nothing heavy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

TOLD = 3
"""How often the first part of an article names each thing."""

ASIDES = (6, 9)
"""How many sentences stand between the first part and the last, smallest and largest number."""


def _pairs(starts: str, ends: str) -> list[str]:
    return [start + end for start in starts.split() for end in ends.split()]


_NAMES = (
    "Ada Alma Amos Anna Anton Arno Basil Bela Berta Bram Cara Carl Cleo Cora Cyril Dara "
    "Delia Dora Edda Edgar Egon Elias Ella Elmar Emil Enid Erik Esme Ewan Fanny Felix Flora "
    "Frida Gerda Greta Hanna Hector Hedda Hugo Ida Igor Ilse Ines Iris Ivan Jonas Josef Judith"
).split()

KINDS: dict[str, list[str]] = {
    "the town of": _pairs("Ash Elm Oak Thorn", "bridge mere stow wick"),
    "the river": _pairs("Al Bre Cor Dun", "ne wen ra ster"),
    "the ship": _pairs("Star Sea Moon Wind", "bird rose light wolf"),
    "Lord": _NAMES[:16],
    "Saint": _NAMES[16:32],
    "the painter": _NAMES[32:],
}
"""What an article speaks of, one thing of each kind: how it is called, and the names that there are."""

_TITLES = ("A history of {town}", "Old {town}", "Life in {town}", "{town} and its people")

# {x} is the thing with its name; the first time it can only be guessed.
_STATEMENTS = (
    "We first hear of {x} .",
    "Many songs praise {x} .",
    "Old maps show {x} .",
    "The books speak of {x} .",
    "People still love {x} .",
)

# Here it can be known, but only by looking back over what lies between.
_RETURNS = (
    "In the end nothing was left of {x} .",
    "No letter names {x} again .",
    "Today a stone recalls {x} .",
    "The last page is about {x} .",
)

_ASIDES = (
    "The valley changed little in those years .",
    "Trade was slow , and many shops closed .",
    "The new road brought buyers from the towns .",
    "A flood destroyed part of the archive .",
    "Prices rose sharply after the war .",
    "The market was held twice a week .",
    "Most families kept a few animals .",
    "Newspapers of the day took no notice .",
    "Two of the old mills can still be visited .",
    "The railway reached the valley at last .",
    "Winters were long and the snow lay deep .",
    "The school had one room and one stove .",
)


@dataclass(frozen=True)
class DemoText:
    """Articles in WikiText's form.

    Attributes:
        text: All of them, one after the other.
        recalls: Where names stand that were said far before: (first character, the one after the last).
    """

    text: str
    recalls: tuple[tuple[int, int], ...]


def generate(split: str, num_articles: int, seed: int = 0) -> DemoText:
    """Generate articles about invented places.

    The first part of each names its things, one of each kind, `TOLD` times; the last part names each once more. What
    lies between says nothing of them and is longer than a short window of attention: the names of the last part show
    who can look back that far. The same arguments give the same text everywhere, and a larger `num_articles` only
    appends.

    Args:
        split: Any name; each has its own articles ("train", "validation", "test").
        num_articles: How many.
        seed: Another seed gives other articles.

    Raises: ValueError when `num_articles` is negative.
    """
    if num_articles < 0:
        raise ValueError(f"num_articles must not be negative, got {num_articles}")
    parts: list[str] = []
    recalls: list[tuple[int, int]] = []
    begin = 0
    for number in range(num_articles):
        article, found = _article(random.Random(f"{seed}/{split}/{number}"))
        parts.append(article)
        recalls += [(begin + first, begin + last) for first, last in found]
        begin += len(article)
    return DemoText("".join(parts), tuple(recalls))


def _article(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """An article and where its names come again."""
    things = [f"{kind} {_choose(rng, names)}" for kind, names in KINDS.items()]
    text = f" = {_choose(rng, _TITLES).format(town=things[0].split()[-1])} = \n \n"
    for _ in range(TOLD):
        for thing in _shuffled(rng, things):
            text += f" {_choose(rng, _STATEMENTS).format(x=thing)}"
    asides = ASIDES[0] + _below(rng, ASIDES[1] - ASIDES[0] + 1)
    text += " \n " + " ".join(_choose(rng, _ASIDES) for _ in range(asides)) + " \n"
    recalls = []
    for thing in _shuffled(rng, things):
        before, after = _choose(rng, _RETURNS).split("{x}")
        text += f" {before}{thing}"
        recalls.append((len(text) - len(thing.split()[-1]), len(text)))
        text += after
    return f"{text} \n \n", recalls


# `random()` is the one method whose sequence Python documents as the same in every release.
def _below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)


def _choose(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[_below(rng, len(items))]


def _shuffled(rng: random.Random, items: Sequence[_T]) -> list[_T]:
    rest = list(items)
    return [rest.pop(_below(rng, len(rest))) for _ in items]
