"""Kinds of tokens, from the tokens' own text: what an analysis is broken down by. No tagger is needed."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

KINDS = ("special", "line break", "punctuation", "number", "word", "inside a word")
BORDERS = ("sentence's first", "sentence's last", "within a sentence")
RARITY = ("rarest quarter", "second quarter", "third quarter", "commonest quarter")

FAMILIES: dict[str, tuple[str, ...]] = {"kind": KINDS, "sentence": BORDERS, "rarity": RARITY}
"""Ways to divide tokens, each token being in one class of each."""

_ENDS = ".!?"


def kind_of(text: str, before: str, special: bool) -> str:
    """The kind of a token.

    Args:
        text: As it reads, blanks in front included.
        before: The token before it; empty for none.
        special: It stands for no text.
    """
    if special:
        return "special"
    bare = text.strip()
    if not bare:
        return "line break" if "\n" in text else "punctuation"
    if all(c in string.punctuation or not c.isalnum() for c in bare):
        return "punctuation"
    if bare[0].isdigit():
        return "number"
    joined = text[:1] == bare[:1] and before[-1:].isalnum()
    return "inside a word" if joined else "word"


def kinds(texts: Sequence[str], special: Sequence[bool]) -> list[int]:
    """The kind of each token of a sequence, as its place in KINDS."""
    found, before = [], ""
    for text, no_text in zip(texts, special, strict=True):
        found.append(KINDS.index(kind_of(text, before, no_text)))
        before = "" if no_text else text
    return found


def borders(texts: Sequence[str], special: Sequence[bool]) -> list[int]:
    """Where each token stands in its sentence, as its place in BORDERS: sentences end at `.`, `!`, `?` and lines."""
    found, fresh = [], True
    for text, no_text in zip(texts, special, strict=True):
        bare = text.strip()
        last = not no_text and (bare[-1:] in _ENDS if bare else "\n" in text)
        found.append(1 if last else 0 if fresh and not no_text and bare else 2)
        if last:
            fresh = True
        elif bare and not no_text:
            fresh = False
    return found


def rarity(ids: Sequence[int], counts: Counter[int]) -> list[int]:
    """The quarter of the analysed tokens that each belongs to by how often it occurs, as its place in RARITY."""
    limits, total, running = [], sum(counts.values()), 0
    for count, tokens in sorted(Counter(counts.values()).items()):
        running += count * tokens
        limits.append((count, running - count * tokens / 2))
    quarter = {count: min(3, int(4 * middle / total)) for count, middle in limits}
    return [quarter[counts[token]] for token in ids]


_CONTINUES, _BLANK, _BYTE_BLANK = "##", "▁", "Ġ"
"""Marks of WordPiece, SentencePiece and BPE over bytes: a token that goes on with a word, and two for a blank."""


def texts_of(tokenizer: Any) -> Callable[[int], str]:
    """A token's text, with the blank in front of it where the tokenizer has one there.

    Args:
        tokenizer: Of transformers. Decoding one token alone often loses the blank, so the token's own name is asked.
    """
    names = tokenizer.get_vocab()
    of_bytes = any(name.startswith(_BYTE_BLANK) for name in names)  # decoding one of its tokens keeps the blank
    pieces = not of_bytes and any(name.startswith(_CONTINUES) and name.strip("#") for name in names)

    @cache
    def text(token: int) -> str:
        name = str(tokenizer.convert_ids_to_tokens(token))
        if pieces:
            return name.removeprefix(_CONTINUES) if name.startswith(_CONTINUES) else f" {name}"
        if name.startswith(_BLANK):
            return name.replace(_BLANK, " ")
        return str(tokenizer.decode([token]))

    return text


def classes(
    ids: Sequence[int], counts: Counter[int], decode: Callable[[int], str], special: set[int]
) -> dict[str, list[int]]:
    """The class of each token of a sequence, by family.

    Args:
        ids: The sequence, without padding.
        counts: How often each token occurs in everything that is analysed.
        decode: A token's text, the blank in front of it included.
        special: Tokens that stand for no text.
    """
    texts = [decode(token) for token in ids]
    none = [token in special for token in ids]
    return {"kind": kinds(texts, none), "sentence": borders(texts, none), "rarity": rarity(ids, counts)}
