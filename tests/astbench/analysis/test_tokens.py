"""Kinds of tokens, by hand."""

from collections import Counter
from types import SimpleNamespace

from astbench.analysis.tokens import BORDERS, KINDS, RARITY, borders, classes, kinds, rarity, texts_of

TEXTS = ["<s>", "The", " cat", "alog", " of", " 1", "9", ",", " new", ".", "\n", " It", "'s", " done", "!", "</s>"]
SPECIAL = [text.startswith("<") for text in TEXTS]


def test_kinds():
    assert [KINDS[kind] for kind in kinds(TEXTS, SPECIAL)] == [
        "special",
        "word",
        "word",
        "inside a word",
        "word",
        "number",
        "number",
        "punctuation",
        "word",
        "punctuation",
        "line break",
        "word",
        "inside a word",
        "word",
        "punctuation",
        "special",
    ]


def test_borders():
    found = [BORDERS[place] for place in borders(TEXTS, SPECIAL)]
    assert [text for text, place in zip(TEXTS, found, strict=True) if place == "sentence's first"] == ["The", " It"]
    assert [text for text, place in zip(TEXTS, found, strict=True) if place == "sentence's last"] == [".", "\n", "!"]


def test_rarity_is_by_quarters_of_all_tokens():
    """100 tokens: 25 that occur once, one 25 times, one 50 times."""
    counts = Counter({**{token: 1 for token in range(25)}, 100: 25, 200: 50})
    assert [RARITY[q] for q in rarity([3, 100, 200], counts)] == [
        "rarest quarter",
        "second quarter",
        "commonest quarter",
    ]
    assert rarity([7], Counter({7: 3})) == [2]


def tokenizer(*names):
    return SimpleNamespace(
        get_vocab=lambda: {name: i for i, name in enumerate(names)},
        convert_ids_to_tokens=lambda i: names[i],
        decode=lambda ids: {"Ġcat": " cat", "Ċ": "\n"}.get(names[ids[0]], names[ids[0]]),
    )


def test_texts_of_three_families_of_tokenizers():
    for names, wanted in (
        (("cat", "##alog", "##"), [" cat", "alog", "##"]),
        (("▁cat", "alog", "▁"), [" cat", "alog", " "]),
        (("Ġcat", "alog", "Ċ", "####", "##a"), [" cat", "alog", "\n"]),
    ):
        text = texts_of(tokenizer(*names))
        assert [text(i) for i in range(2)] == wanted[:2]
    assert text(2) == "\n"


def test_every_token_is_in_one_class_of_each_family():
    ids = list(range(len(TEXTS)))
    found = classes(ids, Counter(ids), TEXTS.__getitem__, {0, 15})
    assert found.keys() == {"kind", "sentence", "rarity"} and all(len(row) == len(ids) for row in found.values())
