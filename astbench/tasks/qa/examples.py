"""What every extractive question-answering source yields, torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from astbench.errors import DataError
from astbench.files.text import LONGEST

PARAGRAPH_BREAK = "\n\n"
"""What stands between the parts of a document."""


@dataclass(frozen=True)
class QAExample:
    """One question about one document.

    Attributes:
        question_id: Unique within its split.
        question: The question as asked.
        answers: The canonical answer first, then its aliases; any of them is right.
        context: The document's text.
        title: The document's title, empty where the source has none.
        answer_starts: Character offsets in `context` at which one of `answers` begins (where
            several of them match, the longest is the mention); `None` is distant supervision,
            where the mentions are not annotated.
        article: Number of the article in its file, where whole articles are held out.
    """

    question_id: str
    question: str
    answers: tuple[str, ...]
    context: str
    title: str = ""
    answer_starts: tuple[int, ...] | None = None
    article: int = field(default=0, repr=False)


def document(parts: Sequence[str], where: str) -> str:
    """One document of several paragraphs or pages.

    Raises:
        DataError: longer than what is read as one piece.
    """
    text = PARAGRAPH_BREAK.join(parts)
    if len(text) > LONGEST:
        raise DataError(f"{where}: its document is longer than {LONGEST:,} characters, the most that is read as one")
    return text


def distinct_answers(answers: Sequence[str], where: str) -> tuple[str, ...]:
    """The answers that hold a text, each once.

    Raises:
        DataError: none does.
    """
    kept = tuple(dict.fromkeys(answer for answer in answers if answer.strip()))
    if not kept:
        raise DataError(f"{where}: no answer; a question needs a value or at least one alias")
    return kept
