"""Exact match and F1, with the normalisation of each data set's official scorer. Imports nothing heavy."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TRIVIAQA_PUNCTUATION = set(string.punctuation + "‘’´`")


def normalize_triviaqa(text: str) -> str:
    """TriviaQA's `triviaqa_evaluation.py`: lower case, punctuation and `_` to spaces, no articles."""
    text = text.replace("_", " ").lower()
    text = "".join(" " if ch in _TRIVIAQA_PUNCTUATION else ch for ch in text)
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalize_squad(text: str) -> str:
    """SQuAD's `evaluate-v1.1.py`: lower case, punctuation removed, no articles."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


Normalize = Callable[[str], str]
NORMALIZERS: dict[str, Normalize] = {"triviaqa": normalize_triviaqa, "squad": normalize_squad}


def f1_score(prediction: str, answer: str, normalize: Normalize) -> float:
    """Harmonic mean of token precision and recall, 0 to 1."""
    predicted, wanted = normalize(prediction).split(), normalize(answer).split()
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, answer: str, normalize: Normalize) -> float:
    """1 when the normalised strings agree."""
    return float(normalize(prediction) == normalize(answer))


def score(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], normalize: Normalize
) -> dict[str, dict[str, float]]:
    """`{question id: {"em": ..., "f1": ...}}`, 0 to 100, maximum over each question's aliases.

    A question without a prediction scores 0 whatever its answers, as in the official scorers: it is not compared, since
    an answer such as "A" normalises to nothing. A prediction that normalises to nothing is compared, as there.
    """
    rows = {}
    for question, aliases in answers.items():
        guess = predictions.get(question)
        compared = [] if guess is None else [(guess, alias, normalize) for alias in aliases]
        rows[question] = {
            "em": 100 * max((exact_match(*pair) for pair in compared), default=0.0),
            "f1": 100 * max((f1_score(*pair) for pair in compared), default=0.0),
        }
    return rows


def mean(values: Iterable[float]) -> float:
    """Plain mean, 0 for nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0
