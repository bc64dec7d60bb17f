"""A grammar that writes English sentences and their German, which a tiny model learns from scratch in minutes.

Real in form, and built so that words must be looked up where they stand:

- Order: the German participle or infinitive stands at the end of its clause, and the auxiliary too in relative
  and `weil` clauses, where English has the verb in the middle; an adverb in front turns subject and verb around.
- Agreement at a distance: English past and future forms do not show number, so that "haben" or "hat" must be
  taken from the subject, which a relative clause may part from its verb.
- Gender and case: the articles, adjectives and relative pronouns follow a noun that comes later, and its role.

Words come from one short list for all splits; which split a sentence belongs to follows from the sentence alone,
so none is in two of them.
"""

from __future__ import annotations

import random
import zlib
from typing import NamedTuple

from astbench.tasks.mt.sources import Pair


class _Noun(NamedTuple):
    en: str
    en_plural: str
    de: str
    de_plural: str
    gender: str  # m, f or n


class _Verb(NamedTuple):
    base: str
    past: str
    infinitive: str
    participle: str


def _rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


_PEOPLE = [
    _Noun(*row)
    for row in _rows("""
    woman women Frau Frauen f
    girl girls Mädchen Mädchen n
    teacher teachers Lehrer Lehrer m
    doctor doctors Arzt Ärzte m
    queen queens Königin Königinnen f
    king kings König Könige m
    child children Kind Kinder n
    baker bakers Bäcker Bäcker m
    nurse nurses Pflegerin Pflegerinnen f
    thief thieves Dieb Diebe m
    sister sisters Schwester Schwestern f
    brother brothers Bruder Brüder m
    painter painters Malerin Malerinnen f
    gardener gardeners Gärtner Gärtner m
    aunt aunts Tante Tanten f
    fisherman fishermen Fischer Fischer m
""")
]
_THINGS = [
    _Noun(*row)
    for row in _rows("""
    book books Buch Bücher n
    apple apples Apfel Äpfel m
    lamp lamps Lampe Lampen f
    house houses Haus Häuser n
    table tables Tisch Tische m
    flower flowers Blume Blumen f
    letter letters Brief Briefe m
    picture pictures Bild Bilder n
    clock clocks Uhr Uhren f
    key keys Schlüssel Schlüssel m
    bottle bottles Flasche Flaschen f
    boat boats Boot Boote n
    hat hats Hut Hüte m
    bag bags Tasche Taschen f
    knife knives Messer Messer n
    ring rings Ring Ringe m
""")
]
_VERBS = [
    _Verb(*row)
    for row in _rows("""
    buy bought kaufen gekauft
    find found finden gefunden
    take took nehmen genommen
    sell sold verkaufen verkauft
    paint painted malen gemalt
    lose lost verlieren verloren
    bring brought bringen gebracht
    hide hid verstecken versteckt
    clean cleaned putzen geputzt
    steal stole stehlen gestohlen
    hold held halten gehalten
    draw drew zeichnen gezeichnet
""")
]
_MEETINGS = [
    _Verb(*row)
    for row in _rows("""
    see saw sehen gesehen
    know knew kennen gekannt
    love loved lieben geliebt
    visit visited besuchen besucht
    call called rufen gerufen
    hear heard hören gehört
""")
]
_ADJECTIVES = _rows("""
    small klein
    old alt
    young jung
    new neu
    red rot
    green grün
    white weiß
    beautiful schön
    strange fremd
    quiet still
    heavy schwer
    clever klug
""")
_ADVERBS = [
    ("today", "heute"),
    ("in the evening", "am Abend"),
    ("in the city", "in der Stadt"),
    ("on Sunday", "am Sonntag"),
    ("at home", "zu Hause"),
    ("here", "hier"),
]

_DEFINITE = {
    "nominative": {"m": "der", "f": "die", "n": "das", "pl": "die"},
    "accusative": {"m": "den", "f": "die", "n": "das", "pl": "die"},
}
"""The article, and the relative pronoun too."""
_INDEFINITE = {
    "nominative": {"m": "ein", "f": "eine", "n": "ein"},
    "accusative": {"m": "einen", "f": "eine", "n": "ein"},
}
_AFTER_DEFINITE = {
    "nominative": {"m": "e", "f": "e", "n": "e", "pl": "en"},
    "accusative": {"m": "en", "f": "e", "n": "e", "pl": "en"},
}
"""Endings of an adjective."""
_AFTER_INDEFINITE = {
    "nominative": {"m": "er", "f": "e", "n": "es"},
    "accusative": {"m": "en", "f": "e", "n": "es"},
}

_AUXILIARY = {("past", False): "hat", ("past", True): "haben", ("future", False): "wird", ("future", True): "werden"}


def generate(split: str, count: int, *, seed: int = 0) -> list[Pair]:
    """Sentence pairs of a split, each English sentence once; the same arguments give the same pairs.

    Args:
        split: train, validation or test.
        count: How many; more only append.
        seed: Other pairs.
    """
    rng = random.Random(f"{split} {seed}")
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        pair = _sentence(rng)
        if _split_of(pair.en) == split:
            pairs.setdefault(pair.en, pair)
    return list(pairs.values())


def _split_of(sentence: str) -> str:
    return {0: "validation", 1: "test"}.get(zlib.crc32(sentence.encode()) % 10, "train")


def _sentence(rng: random.Random) -> Pair:
    english, german = _clause(rng, main=True)
    if rng.random() < 0.25:
        other = _clause(rng, main=False)
        english, german = f"{english} because {other[0]}", f"{german}, weil {other[1]}"
    return Pair(english[0].upper() + english[1:] + ".", german[0].upper() + german[1:] + ".")


def _clause(rng: random.Random, *, main: bool) -> tuple[str, str]:
    """Subject, verb and object in both languages; in a German main clause the auxiliary is its second part."""
    plural = rng.random() < 0.5
    subject = _phrase(rng, _PEOPLE, "nominative", plural=plural, relative=rng.random() < 0.4)
    verb, thing = rng.choice(_VERBS), _phrase(rng, _THINGS, "accusative", plural=rng.random() < 0.3)
    tense = rng.choice(("past", "future"))
    en_verb, end = _forms(verb, tense)
    auxiliary = _AUXILIARY[tense, plural]
    if not main:
        return f"{subject[0]} {en_verb} {thing[0]}", f"{subject[1]} {thing[1]} {end} {auxiliary}"
    if rng.random() < 0.4:
        en_adverb, de_adverb = rng.choice(_ADVERBS)
        return (
            f"{en_adverb} {subject[0]} {en_verb} {thing[0]}",
            f"{de_adverb} {auxiliary} {subject[1]} {thing[1]} {end}",
        )
    return f"{subject[0]} {en_verb} {thing[0]}", f"{subject[1]} {auxiliary} {thing[1]} {end}"


def _forms(verb: _Verb, tense: str) -> tuple[str, str]:
    """The English verb, and what closes the German clause."""
    return (verb.past, verb.participle) if tense == "past" else (f"will {verb.base}", verb.infinitive)


def _phrase(
    rng: random.Random, nouns: list[_Noun], case: str, *, plural: bool, relative: bool = False
) -> tuple[str, str]:
    """A noun with its article, perhaps an adjective and a relative clause."""
    noun = rng.choice(nouns)
    form = "pl" if plural else noun.gender
    definite = plural or rng.random() < 0.6
    article = (_DEFINITE if definite else _INDEFINITE)[case][form]
    english, german = ["the" if definite else "a"], [article]
    if rng.random() < 0.5:
        en_adjective, stem = rng.choice(_ADJECTIVES)
        ending = (_AFTER_DEFINITE if definite else _AFTER_INDEFINITE)[case][form]
        english.append(en_adjective)
        german.append(stem + ending)
    english.append(noun.en_plural if plural else noun.en)
    if not definite and english[1][0] in "aeiou":
        english[0] = "an"
    german.append(noun.de_plural if plural else noun.de)
    if relative:
        en_clause, de_clause = _relative(rng, form, plural=plural)
        english.append(en_clause)
        german[-1] += f", {de_clause},"
    return " ".join(english), " ".join(german)


def _relative(rng: random.Random, form: str, *, plural: bool) -> tuple[str, str]:
    """A relative clause about a noun, as its subject or its object."""
    verb, tense = rng.choice(_MEETINGS), rng.choice(("past", "future"))
    en_verb, end = _forms(verb, tense)
    if rng.random() < 0.5:
        other = _phrase(rng, _PEOPLE, "accusative", plural=rng.random() < 0.3)
        auxiliary = _AUXILIARY[tense, plural]
        return f"that {en_verb} {other[0]}", f"{_DEFINITE['nominative'][form]} {other[1]} {end} {auxiliary}"
    others = rng.random() < 0.5
    other = _phrase(rng, _PEOPLE, "nominative", plural=others)
    auxiliary = _AUXILIARY[tense, others]
    return f"that {other[0]} {en_verb}", f"{_DEFINITE['accusative'][form]} {other[1]} {end} {auxiliary}"
