"""Invented articles and questions that a tiny model learns from scratch in minutes.

Real in form: articles of 200 to 400 words about invented makers and towns, questions in several
wordings, answers with aliases, eight or so distractors of the same kind in each article. Names come
from finite pools that all splits share (a word-level vocabulary of under 3,000 words covers them),
facts are drawn afresh for every article, so nothing can be memorised.

Learnable in minutes, because each paragraph states facts of one kind about several people: only the name
tells them apart, so that matching names pays from the first steps on; and sentences name the person before
the answer, so that the nearest name before an answer is its own. Otherwise small encoders stay for thousands
of steps where they find the kind and guess the person.

The form also separates attention patterns. Everything that a question does not share with all others
(the person's name) stands after its first 16 tokens, so a token that sees only its neighbours and random
blocks cannot match the name; a fact's sentence holds person, relation and answer within 20 tokens, so a
few well-chosen blocks are enough. (Not so with a first block that every token sees: it neighbours the
name and relays it to all, and random blocks do as well as chosen ones.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from astbench.tasks.qa.examples import QAExample

_T = TypeVar("_T")

PARAGRAPHS = (5, 7)
"""How many paragraphs a full-length article has, smallest and largest."""

MOST_PARAGRAPHS = 8
QUESTIONS_PER_ARTICLE = 2
PEOPLE_PER_PARAGRAPH = 4
NAME_SHARE = 0.3

_GIVEN = (
    "Ada Alma Amos Anna Anton Arno Astrid Basil Bela Berta Bram Cara Carl Cleo Conrad Cora Cyril Dara "
    "Delia Dora Edda Edgar Edith Egon Elias Ella Elmar Elsa Emil Enid Erik Esme Esther Ewan Fanny Felix "
    "Flora Frida Gerda Greta Gustav Hanna Hector Hedda Helga Henrik Hilda Hugo Ida Igor Ilse Ines Ingrid "
    "Iris Ivan Ivo Jonas Josef Judith Jutta Karin Kaspar Klara Konrad Lara Lena Leo Lidia Linus Lotte "
    "Lucia Ludo Magda Mara Marek Marta Matilda Milo Mina Mira Moritz Nadia Nils Nina Nora Olaf Olga Oskar "
    "Otto Paula Petra Ralf Rosa Rufus Sigrid Silas Sofia Sonja Stella Sven Tilda Tobias Ulla Vera Viktor "
    "Walter Wanda"
).split()

_SURNAMES = (
    "Abelard Ackroyd Alder Amsel Arkwright Ashdown Auger Bartle Baskin Bellamy Bexley Birkett Blandon "
    "Bode Borrow Bracken Brandt Brisk Calder Carrow Cawley Chard Clewes Colley Corvin Crake Cutler Dabney "
    "Dacre Danvers Darke Delano Denham Dormer Drake Dunning Eckhart Eddow Ellery Elstob Emsley Fabel "
    "Fairfax Fane Farrow Fenner Finch Flint Fossick Frome Gadsby Galt Garrick Gedney Gilpin Glover Gorman "
    "Grail Grimsby Gurney Hackett Haldane Harker Hatch Hazel Heron Hobart Holm Huxtable Ibsley Ingram "
    "Jarrow Jessop Jolley Kemble Kerrigan Kestrel Kipling Kirby Lacey Lambert Larkin Ledger Lindt Lomax "
    "Lovell Maddock Malloy Marlow Marsh Medlar Merrick Moffat Morley Mundy Nangle Napier Nettle Noakes "
    "Norwood Oakden Ogden Orchard Orrin Osgood Paget Palmer Parr Peabody Pender Pettle Pinder Prewett "
    "Quarles Quill Quincy Radnor Ramsey Raven Redfern Rigby Rooke Rudge Sable Salter Savory Scully Selwyn "
    "Shard Skelton Snow Sorrel Stroud Swann Tabor Tanner Teasel Thorne Tiller Tolley Trask Udall Upton "
    "Vance Varley Venn Vosper Wadlow Warde Webster Wexford Whitlock Wilder Winslow Wragge Yardley Yarrow "
    "Yule Zeller"
).split()

_FAMILIES = _SURNAMES[::4]
_MASTERS = [name for name in _SURNAMES if name not in _FAMILIES]

_TOWN_STEMS = (
    "Amber Ash Black Bram Cold Crom Dun East Fal Glen Hart Hol Inver Kel Lang Mar Nor Oak Pen Rush Sel Stan Thorn Wal"
).split()
_TOWN_ENDINGS = ["bridge", "by", "cliffe", "mere", "stow"]
_TOWNS = [stem + ending for stem in _TOWN_STEMS for ending in _TOWN_ENDINGS]
_OLD_STEMS = ("Cor Dal Eb Gor Lug Mal Or Sor Tal Vel").split()
_OLD_ENDINGS = ["inum", "mora", "tunia", "vessa"]
_OLD_NAMES = [stem + ending for stem in _OLD_STEMS for ending in _OLD_ENDINGS]
_OLD_NAME_OF = dict(zip(_TOWNS[::3], _OLD_NAMES, strict=True))
"""Every third town is known by two names, of which an article uses one."""

_TITLE_FIRST = (
    "Amber Ashen Bitter Blue Broken Crimson Distant Drowned Empty Frozen Gilded Hidden Hollow Iron Ivory "
    "Lonely Painted Paper Quiet Salt Scarlet Silent Silver Sleeping Velvet Winter Golden Marble Restless Secret "
    "Stolen Wooden"
).split()
_TITLE_SECOND = (
    "Balcony Bell Candle Cathedral Compass Crown Falcon Ferry Garden Gate Harvest Lantern Meadow Mirror "
    "Nightingale Pilgrim Procession Shepherd Staircase Tower Voyage Willow Anchor Bridge Chapel Fountain Island "
    "Letter Orchid Portrait Riddle Window"
).split()

_PROFESSIONS = (
    "architect bookbinder botanist carpenter cartographer composer dramatist engraver essayist glassmaker "
    "goldsmith historian illustrator novelist organist painter philosopher photographer poet potter "
    "printer sculptor violinist weaver"
).split()

_REGIONS = (
    "Varrow Tessel Lunden Orrest Hallin Kestor Mirren Solway Brennan Aldous Corran Feldane Garth Ismere Peverel Rothen"
).split()

_FIRST_YEAR, _LAST_YEAR = 1780, 1930


@dataclass(frozen=True)
class _Kind:
    """A kind of fact: how articles state it and how questions ask for it."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


# {s} is the person's name, {p} the profession, {a} the answer.
_KINDS = (
    _Kind(
        "birthplace",
        (
            "{s} was born in {a}, the child of a miller.",
            "{s} was born in {a} during a hard winter.",
            "The {p} {s} was born in {a}.",
            "{s}, who was born in {a}, was the eldest of five.",
            "{s} came into the world in {a}.",
        ),
        (
            "in which town was the {p} {s} born?",
            "what is the birthplace of the {p} {s}?",
            "which town was the birthplace of {s}, the {p}?",
        ),
    ),
    _Kind(
        "work",
        (
            "{s} is best known for {a}, which took three years.",
            "{s} finished {a} after a long illness.",
            "{s} won the praise of critics with {a}.",
            "{s} gave the world {a}, a strange and lovely work.",
            "The {p} {s} is remembered for {a}.",
        ),
        (
            "for which work is the {p} {s} best known?",
            "which work made the {p} {s} famous?",
            "what is the best known work of the {p} {s}?",
        ),
    ),
    _Kind(
        "teacher",
        (
            "{s} studied under {a} for six years.",
            "{s} learned the craft from {a}.",
            "{s} was a pupil of {a}, by all accounts a diligent one.",
            "{s} owed much to {a}, a patient teacher.",
            "The {p} {s} was taught by {a}.",
        ),
        (
            "by which teacher was the {p} {s} taught?",
            "under which teacher did the {p} {s} study?",
            "who was the teacher of the {p} {s}?",
        ),
    ),
    _Kind(
        "guild_year",
        (
            "{s} joined the guild in {a}.",
            "{s} was admitted to the guild in {a}, after some debate.",
            "{s} became a member of the guild in {a}.",
            "{s} entered the guild in the spring of {a}.",
            "The {p} {s} entered the guild in {a}.",
        ),
        (
            "in which year did the {p} {s} join the guild?",
            "in what year was the {p} {s} admitted to the guild?",
            "when did the {p} named {s} enter the guild?",
        ),
    ),
)

_NAME_QUESTIONS = (
    "what was the full name of the {p} {s}?",
    "what is the given name of the {p} {s}?",
    "what was {s}, the {p}, called in full?",
    "by what full name is the {p} {s} introduced?",
)

# Fifteen tokens or more with the closing comma, so that no question names its person before token 16.
_OPENINGS = (
    "According to the records of the regional archive that this short article draws on,",
    "Going by what the author of this article tells us about the valley and its makers,",
    "If the account given in the pages of the local history is to be believed,",
    "To judge from the text that follows and from no other source of any kind,",
    "As far as a careful reader can tell from the article that is printed here,",
    "Among the many people whose lives are told in this article on the old valley,",
    "In the article on local history that you have in front of you at present,",
    "Reading the article below from the first line to the last with some care,",
)

_INTRODUCTIONS = (
    "The {r} valley was known for its makers long before the railway came.",
    "Few valleys can claim as many makers as {r} could in its best years.",
    "This page collects what is known of the makers of the {r} valley.",
    "For more than a century the {r} valley drew people of every craft.",
    "The guild of the {r} valley kept careful books, and most of them survive.",
    "Visitors to the {r} valley often ask about the people who made its name.",
)

_ASIDES = (
    "The valley changed little in those years.",
    "Letters from the time speak of cold rooms and long evenings.",
    "Little else is known of this period.",
    "Trade was slow, and many workshops closed.",
    "The new road brought buyers from the coast.",
    "A flood destroyed part of the archive, so some dates are uncertain.",
    "Prices rose sharply after the war.",
    "The market was held twice a week.",
    "Most families kept a garden and a few animals.",
    "Newspapers of the day took no notice.",
    "Two of the old workshops can still be visited.",
    "The railway reached the valley at last, and with it came tourists.",
)

_TITLES = ("Makers of the {r} valley", "The {r} guild", "Lives from {r}", "A history of {r}")


@dataclass(frozen=True)
class _Fact:
    """One sentence's content: who, what kind, and the answer with its aliases, mention first."""

    full_name: str
    surname: str
    profession: str
    kind: _Kind
    mention: str
    answers: tuple[str, ...]


def generate(
    split: str, num_questions: int, seed: int = 0, paragraphs: int | tuple[int, int] = PARAGRAPHS
) -> list[QAExample]:
    """Generate questions about invented articles.

    The same arguments give the same text everywhere, and a larger `num_questions` only appends.

    Args:
        split: Any name; each has its own articles ("train", "validation", "test").
        num_questions: How many questions; every `QUESTIONS_PER_ARTICLE` of them share an article.
        seed: Another seed gives other articles.
        paragraphs: How many paragraphs an article has, or the smallest and largest number. Short
            articles have fewer distractors and are the easy start of a curriculum.

    Returns: The examples, with `answer_starts` holding the one mention of the answer.

    Raises: ValueError when `num_questions` is negative or `paragraphs` is not within 1 to `MOST_PARAGRAPHS`.
    """
    low, high = (paragraphs, paragraphs) if isinstance(paragraphs, int) else paragraphs
    if not 1 <= low <= high <= MOST_PARAGRAPHS:
        raise ValueError(f"paragraphs must be between 1 and {MOST_PARAGRAPHS}, smallest first, got {paragraphs}")
    if num_questions < 0:
        raise ValueError(f"num_questions must not be negative, got {num_questions}")
    examples: list[QAExample] = []
    article = 0
    while len(examples) < num_questions:
        rng = random.Random(f"{seed}/{split}/{article}")
        num_paragraphs = low + _below(rng, high - low + 1)
        examples += _article(rng, f"{split}-{seed}-{article}", num_paragraphs)
        article += 1
    return examples[:num_questions]


def _article(rng: random.Random, name: str, num_paragraphs: int) -> list[QAExample]:
    region = _choose(rng, _REGIONS)
    facts = _draw_facts(rng, num_paragraphs)
    introduced: list[int] = []
    starts: list[int] = []
    context = _choose(rng, _INTRODUCTIONS).format(r=region)
    for paragraph in range(num_paragraphs):
        aside = 1 + _below(rng, PEOPLE_PER_PARAGRAPH - 1)
        for place in range(PEOPLE_PER_PARAGRAPH):
            context += "\n" if place == 0 else " "
            if place == aside:
                context += _choose(rng, _ASIDES) + " "
            fact = facts[paragraph * PEOPLE_PER_PARAGRAPH + place]
            sentence, offset = _state(rng, fact)
            starts.append(len(context) + offset)
            introduced.append(len(context) + sentence.index(fact.full_name))
            context += sentence
    title = _choose(rng, _TITLES).format(r=region)
    examples = []
    for number, index in enumerate(_sample(rng, range(len(facts)), QUESTIONS_PER_ARTICLE)):
        fact = facts[index]
        answers: tuple[str, ...]
        if rng.random() < NAME_SHARE:
            template, start = _choose(rng, _NAME_QUESTIONS), introduced[index]
            answers = (fact.full_name, fact.full_name.split()[0])
        else:
            template, answers, start = _choose(rng, fact.kind.questions), fact.answers, starts[index]
        question = f"{_choose(rng, _OPENINGS)} {template.format(s=fact.surname, p=fact.profession)}"
        examples.append(QAExample(f"{name}-{number}", question, answers, context, title, (start,)))
    return examples


def _draw_facts(rng: random.Random, num_paragraphs: int) -> list[_Fact]:
    """Draw everyone's fact, one kind a paragraph; no surname, town, work or year comes twice in an article."""
    num_people = num_paragraphs * PEOPLE_PER_PARAGRAPH
    surnames = _sample(rng, _FAMILIES, num_people)
    masters = _sample(rng, _MASTERS, num_people)
    given = _sample(rng, _GIVEN, 2 * num_people)
    towns = _sample(rng, _TOWNS, num_people)
    firsts = _sample(rng, _TITLE_FIRST, num_people)
    seconds = _sample(rng, _TITLE_SECOND, num_people)
    years = _sample(rng, range(_FIRST_YEAR, _LAST_YEAR + 1), num_people)
    kinds = [_choose(rng, _KINDS) for _ in range(num_paragraphs)]
    facts: list[_Fact] = []
    for i in range(num_people):
        kind = kinds[i // PEOPLE_PER_PARAGRAPH]
        teacher = f"{given[num_people + i]} {masters[i]}"
        work = f"{firsts[i]} {seconds[i]}"
        mention, answers = {
            "birthplace": _town_answers(rng, towns[i]),
            "work": (f"The {work}", (f"The {work}", work)),
            "teacher": (teacher, (teacher, masters[i])),
            "guild_year": (str(years[i]), (str(years[i]),)),
        }[kind.name]
        profession = _choose(rng, _PROFESSIONS)
        facts.append(_Fact(f"{given[i]} {surnames[i]}", surnames[i], profession, kind, mention, answers))
    return facts


def _town_answers(rng: random.Random, town: str) -> tuple[str, tuple[str, ...]]:
    """The name that the article uses, and all names."""
    names = (town, _OLD_NAME_OF[town]) if town in _OLD_NAME_OF else (town,)
    return _choose(rng, names), names


def _state(rng: random.Random, fact: _Fact) -> tuple[str, int]:
    """State a fact; and where the answer begins in the sentence."""
    before, after = _choose(rng, fact.kind.statements).split("{a}")
    before, after = (part.format(s=fact.full_name, p=fact.profession) for part in (before, after))
    return before + fact.mention + after, len(before)


# `random()` is the one method whose sequence Python documents as the same in every release.
def _below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)


def _choose(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[_below(rng, len(items))]


def _sample(rng: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    """Draw `count` different items, in random order."""
    rest = list(items)
    return [rest.pop(_below(rng, len(rest))) for _ in range(count)]
