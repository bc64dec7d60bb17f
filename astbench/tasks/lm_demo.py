"""Generated articles that name people early and speak of them again much later. Imports nothing heavy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

PEOPLE = 10
"""How many people an article names."""

ASIDES = (9, 13)
"""How many sentences stand between the first and the second time, smallest and largest number."""

_NAMES = (
    "Ada Alma Amos Anna Anton Arno Basil Bela Berta Bram Cara Carl Cleo Cora Cyril Dara Delia Dora Edda Edgar Egon "
    "Elias Ella Elmar Emil Enid Erik Esme Ewan Fanny Felix Flora Frida Gerda Greta Hanna Hector Hedda Hugo Ida Igor "
    "Ilse Ines Iris Ivan Jonas Josef Judith Karin Klara Lara Leo Linus Lotte Magda Mara Marek Mira Nadia Nils Olga "
    "Otto Petra Rosa"
).split()

_CRAFTS = (
    "archer baker barber brewer butcher carpenter carter clerk cook cooper doctor dyer farmer fiddler fisher gardener "
    "glazier hatter hunter innkeeper judge mason miller miner painter potter printer sailor shepherd smith tailor "
    "weaver"
).split()

_REGIONS = "Aldous Brennan Corran Feldane Garth Hallin Ismere Kestor Lunden Mirren Orrest Peverel Rothen Varrow".split()

_TITLES = ("People of {r}", "The {r} valley", "Lives from {r}", "A history of {r}")

_INTRODUCTIONS = (
    "The {r} valley was known for its people long before the railway came .",
    "This page collects what is known of the people of the {r} valley .",
    "The books of the {r} valley are old , and most of them survive .",
)

# {c} is the craft, {n} the name; it is first read here, and can only be guessed.
_STATEMENTS = (
    "The {c} {n} came from the coast .",
    "At the old bridge lived the {c} {n} .",
    "Of the {c} {n} we know little .",
    "The {c} {n} kept bees and goats .",
    "In the last house stood the shop of the {c} {n} .",
    "Near the mill the {c} {n} had a garden .",
    "Many came to see the {c} {n} at work .",
)

# Here it can be known, but only by looking back to the statement.
_RETURNS = (
    "In the end the {c} {n} left the valley .",
    "The letters of the {c} {n} were lost in the fire .",
    "Nobody was surprised when the {c} {n} sold the house .",
    "After the flood the {c} {n} built a new wall .",
    "Two streets are named after the {c} {n} today .",
    "A stone in the yard still shows where the {c} {n} worked .",
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
    """Generate articles about invented people.

    Each names its people, one to a craft, in its first part and once more, in another order, in its last. The part
    between says nothing of them and is longer than a short window of attention: the names of the last part show
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
    region = _choose(rng, _REGIONS)
    people = list(zip(_sample(rng, _CRAFTS, PEOPLE), _sample(rng, _NAMES, PEOPLE), strict=True))
    text = f" = {_choose(rng, _TITLES).format(r=region)} = \n \n {_choose(rng, _INTRODUCTIONS).format(r=region)} "
    text += " ".join(_choose(rng, _STATEMENTS).format(c=craft, n=name) for craft, name in people)
    asides = ASIDES[0] + _below(rng, ASIDES[1] - ASIDES[0] + 1)
    text += " \n " + " ".join(_choose(rng, _ASIDES) for _ in range(asides)) + " \n"
    recalls = []
    for craft, name in _sample(rng, people, PEOPLE):
        before, after = _choose(rng, _RETURNS).split("{n}")
        text += f" {before.format(c=craft)}"
        recalls.append((len(text), len(text) + len(name)))
        text += name + after
    return f"{text} \n \n", recalls


# `random()` is the one method whose sequence Python documents as the same in every release.
def _below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)


def _choose(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[_below(rng, len(items))]


def _sample(rng: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    """Draw `count` different items, in random order."""
    rest = list(items)
    return [rest.pop(_below(rng, len(rest))) for _ in range(count)]
