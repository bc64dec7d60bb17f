"""Generated text with sentences to be found again in it, after RULER's multi-key needles in a haystack."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

KEYS = """
falcon badger heron otter lynx beetle walrus gecko magpie salmon turtle hornet raven ferret moose viper
lantern anchor hammer kettle ladder mirror saddle trumpet violin compass barrel candle carpet basket pillow shovel
almond barley cherry garlic ginger lemon mango nutmeg olive pepper radish saffron turnip walnut clover fern
canyon glacier harbour island meadow volcano desert lagoon prairie summit valley waterfall cavern delta geyser reef
""".split()
"""What is asked about."""

VALUES = """
amber azure beige bronze copper coral crimson cyan ebony emerald golden indigo ivory jade lilac magenta
maroon mauve ochre opal orange pearl pink purple ruby russet sapphire scarlet silver teal turquoise violet
agate basalt chalk cobalt flint garnet gneiss granite gypsum jasper marble nickel onyx pewter pumice quartz
cotton denim felt flannel hemp jute lace leather linen muslin nylon satin silk suede tweed velvet
""".split()
"""What is to be answered, where it is a word."""

DIGITS = 7
"""Of what is to be answered, where it is a number."""

_WHO = "The baker|The teacher|A neighbour|The old sailor|My cousin|The doctor|A young clerk|The gardener".split("|")
_DID = "walked past|looked for|wrote about|talked about|waited near|thought of|slowly painted|came back to".split("|")
_WHAT = (
    "the station|a small garden|the town hall|a quiet street|the old bridge|the market|a tall tree|the school".split(
        "|"
    )
)
_WHEN = "in the morning|on a rainy day|before dinner|late at night|after the war|every summer|once more".split("|")

NEEDLE = "The secret of the {key} is {value}."
QUESTION = "What is the secret of the {key}? The secret of the {key} is {value}"


@dataclass(frozen=True)
class NeedleText:
    """A text, and where in it the answers to its questions stand.

    Attributes:
        text: Haystack, needles and questions with their answers.
        answers: Start and end of each question's answer, in characters of `text`.
        depths: Where each question's needle lies in the haystack, in percent.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    depths: tuple[int, ...]


def generate(
    rng: random.Random,
    depths: list[int],
    *,
    length: int,
    num_keys: int,
    values: Literal["words", "numbers"],
    count: Callable[[str], int],
) -> NeedleText:
    """One text with one question for each of `depths`.

    After Hsieh et al. 2024 (RULER), arXiv 2404.06654, section 3 and appendix B: several keys of one form, of which
    some are asked for, so that finding any needle is not enough. It differs in the wording, in filler sentences that
    are put together at random (RULER repeats four, or takes essays), and in needles that name one word.

    Args:
        rng: Decides everything.
        depths: Percent of the haystack that lies before the needle of each question.
        length: Least number of tokens; of those there are too many, all belong to the filler sentence in front.
        num_keys: Needles, those asked for among them; the others lie anywhere.
        values: Words, or numbers of `DIGITS` digits.
        count: Tokens of a text.
    """
    keys = rng.sample(KEYS, num_keys)
    given = rng.sample(VALUES, num_keys) if values == "words" else [_number(rng) for _ in keys]
    needles = [NEEDLE.format(key=key, value=value) for key, value in zip(keys, given, strict=True)]
    questions = [QUESTION.format(key=k, value=v) for k, v in zip(keys, given, strict=True)][: len(depths)]
    budget = length - sum(count(" " + part) for part in (*needles, *questions))
    hay: list[str] = []
    while budget > 0:
        hay.append(_filler(rng))
        budget -= count(" " + hay[-1])
    hay = hay[:-1]  # it is too much; what is missing now comes in front, below
    places = [round(depth / 100 * len(hay)) for depth in depths]
    places += [rng.randint(0, len(hay)) for _ in needles[len(depths) :]]
    put = sorted(zip(places, needles, strict=True), reverse=True)
    for place, needle in put:
        hay.insert(place, needle)
    order = list(range(len(questions)))
    rng.shuffle(order)
    tail, ends = "", []
    for number in order:
        tail += (". " if tail else "") + questions[number]
        ends.append(len(tail))
    hay.insert(0, _filler(rng))
    while count(text := " ".join([*hay, tail])) < length:
        hay.insert(0, _filler(rng))
    begin = len(text) - len(tail)
    spans = [(begin + end - len(given[number]), begin + end) for number, end in zip(order, ends, strict=True)]
    return NeedleText(text, tuple(spans), tuple(depths[number] for number in order))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _filler(rng: random.Random) -> str:
    return f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}."


def words() -> list[str]:
    """Every word, digit and mark that a text can hold, each once, in order."""
    parts = [*_WHO, *_DID, *_WHAT, *_WHEN, NEEDLE.format(key="", value=""), QUESTION.format(key="", value="")]
    text = " ".join(parts).replace(".", " . ").replace("?", " ? ")
    return sorted({*text.split(), *KEYS, *VALUES, *"0123456789"})
