"""What every extractive question-answering source yields, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field


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
