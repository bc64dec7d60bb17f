"""Reader of SQuAD, versions 1.1 and 2: official JSON files, and the hub's rows."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import isdir  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import Any

from astbench.errors import DataError
from astbench.files import fields
from astbench.files.hub import hub_rows
from astbench.files.text import plain, read_json
from astbench.tasks.qa.examples import PARAGRAPH_BREAK, QAExample, distinct_answers, document

SQUAD_HUB = ("rajpurkar/squad", "plain_text", "7b6d24c440a36b6815f21b70d25016731768db1f")
"""Data set, configuration and revision on the Hugging Face hub."""

_SPLIT_WORDS = {"train": ("train",), "validation": ("dev", "valid"), "test": ("test",)}


def squad_file(place: Path, split: str) -> tuple[Path, bool]:
    """The file of a split, and whether it is the split's own; else it is the only one there.

    Raises:
        DataError: several files of which none, or more than one, is named after the split.
    """
    if not isdir(place):
        return place, False
    found = sorted(file for ending in ("json", "json.gz") for file in place.glob(f"*.{ending}"))
    if len(found) == 1:
        return found[0], False
    own = [file for file in found if any(word in file.name.lower() for word in _SPLIT_WORDS[split])]
    if len(own) != 1:
        raise DataError(
            f"--data.path={place} must hold one SQuAD JSON file, or one whose name says "
            f"{' or '.join(_SPLIT_WORDS[split])} for the {split} split; found {len(found)}, of that name {len(own)}; "
            "name the file"
        )
    return own[0], True


def read_squad_file(file: Path, whole_articles: bool, notes: list[str]) -> list[QAExample]:
    """A question and its paragraph each, or its whole article; questions without an answer are left out.

    Args:
        file: Official JSON, also `.gz`.
        whole_articles: Ask about the article instead of the paragraph.
        notes: Told how many questions were left out.

    Raises:
        DataError: a damaged file, or another format; names the file and the question.
    """
    data = read_json(file)
    found: list[QAExample | None] = []
    for number, article in enumerate(_part(data, "data", str(file))):
        where = f"{file}: article {number + 1}"
        paragraphs = _part(article, "paragraphs", where)
        title, begin = fields.text(article, "title", where), 0
        places = [f"{where}, paragraph {n}" for n in range(1, len(paragraphs) + 1)]
        contexts = [fields.text(p, "context", place) for p, place in zip(paragraphs, places, strict=True)]
        whole = document(contexts, where) if whole_articles else ""
        for paragraph, place, context in zip(paragraphs, places, contexts, strict=True):
            about = {"context": whole or context, "title": title, "article": number}
            shift = begin if whole_articles else 0
            for n, question in enumerate(_part(paragraph, "qas", place), 1):
                here = f"{place}, question {n}"
                answers = list(_answers(question, paragraph["context"], here))
                found.append(_example(question, answers, shift, here, about))
            begin += len(context) + len(PARAGRAPH_BREAK)
    return _answered(found, str(file), notes)


def read_squad_hub(split: str, notes: list[str]) -> list[QAExample]:
    """A split from the Hugging Face hub at a pinned revision; its offline cache is honoured.

    Raises:
        MissingPackageError: without the `datasets` package.
        DataError: the hub cannot be reached and nothing is cached.
    """
    name, configuration, revision = SQUAD_HUB
    found = []
    for number, row in enumerate(hub_rows(name, configuration, split, revision), 1):
        where = f"{name}/{split}: question {number}"
        about = {"context": fields.text(row, "context", where), "title": fields.text(row, "title", where)}
        given = fields.mapping(row, "answers", where)
        texts, starts = (fields.rows(given, column, where) for column in ("text", "answer_start"))
        pairs = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=False)]
        answers = list(_answers({"answers": pairs}, row["context"], where))
        found.append(_example(row, answers, 0, where, about))
    return _answered(found, f"{name}/{split}", notes)


def _part(data: Any, name: str, where: str) -> list[Any]:
    """A list that the format is built of."""
    try:
        return fields.rows(data, name, where)
    except DataError as error:
        raise DataError(f"{error}; not SQuAD's official format") from error


def _answers(question: Any, context: str, where: str) -> Iterator[tuple[str, int]]:
    """(text, start) of each answer that has a text; of a question that is said to have none, nothing."""
    if fields.flag(question, "is_impossible", where):
        return
    for answer in fields.rows(question, "answers", where):
        text = fields.text(answer, "text", where)
        if not text.strip():
            continue
        start = fields.whole(answer, "answer_start", where)
        if start < 0:
            raise DataError(f"{where}: column 'answer_start' must be 0 or more, got {start}")
        # It counts characters as they stand in the file.
        yield text, len(plain(context[:start], where))


def _example(
    question: Any, answers: list[tuple[str, int]], shift: int, where: str, about: dict[str, Any]
) -> QAExample | None:
    """The question; None for one without an answer, as version 2 asks some."""
    asked = fields.identity(question, "id", where), fields.text(question, "question", where).strip()
    if not answers:
        return None
    starts = tuple(sorted({start + shift for _, start in answers}))
    return QAExample(*asked, distinct_answers([text for text, _ in answers], where), answer_starts=starts, **about)


def _answered(found: list[QAExample | None], where: str, notes: list[str]) -> list[QAExample]:
    """The questions that have an answer; the others are counted."""
    kept = [example for example in found if example is not None]
    if len(kept) < len(found):
        notes.append(f"{len(found) - len(kept)} of {len(found)} questions of {where} have no answer: left out")
    return kept
