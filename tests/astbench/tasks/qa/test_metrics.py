"""The scorers against a plain re-statement of the official ones, missing and empty answers among them."""

import random
import re
import string
from collections import Counter

import pytest

from astbench.tasks.qa.metrics import NORMALIZERS, mean, score

# -- TriviaQA's triviaqa_evaluation.py and SQuAD's evaluate-v1.1.py, as they stand but for names ----------------------


def triviaqa_normalize(text):
    text = text.replace("_", " ").lower()
    exclude = set(string.punctuation + "".join(["‘", "’", "´", "`"]))
    text = "".join(ch if ch not in exclude else " " for ch in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).strip()


def squad_normalize(text):
    exclude = set(string.punctuation)
    text = "".join(ch for ch in text.lower() if ch not in exclude)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(prediction, truth, normalize):
    prediction_tokens, truth_tokens = normalize(prediction).split(), normalize(truth).split()
    same = sum((Counter(prediction_tokens) & Counter(truth_tokens)).values())
    if same == 0:
        return 0
    precision, recall = same / len(prediction_tokens), same / len(truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def official(predictions, truths, normalize):
    """Both scripts: a question that is not among the predictions adds nothing, and is counted."""
    exact_match = f1 = total = 0
    for question, answers in truths.items():
        total += 1
        if question not in predictions:
            continue
        exact_match += max(normalize(predictions[question]) == normalize(truth) for truth in answers)
        f1 += max(official_f1(predictions[question], truth, normalize) for truth in answers)
    return {"em": 100.0 * exact_match / total, "f1": 100.0 * f1 / total}


OFFICIAL = {"triviaqa": triviaqa_normalize, "squad": squad_normalize}
WORDS = [
    "a",
    "A",
    "an",
    "the",
    "The",
    "!!!",
    "_",
    "‘",
    "´a",
    "the_the",
    "a.",
    "Red",
    "red,",
    "house",
    "U.S.",
    "x_y",
    "é",
    "",
]


def phrase(rng):
    return rng.choice([" ", "  ", "-", "_"]).join(rng.choices(WORDS, k=rng.randint(0, 4)))


@pytest.mark.parametrize("task", OFFICIAL)
def test_scores_are_the_official_ones_on_fuzzed_pairs(task):
    rng = random.Random(11)
    truths = {str(n): [phrase(rng) for _ in range(rng.randint(1, 3))] for n in range(20_000)}
    given = {q: rng.choice([phrase(rng), rng.choice(answers)]) for q, answers in truths.items() if rng.random() < 0.7}
    rows = score(given, truths, NORMALIZERS[task])
    for question, answers in truths.items():
        assert rows[question] == pytest.approx(official(given, {question: answers}, OFFICIAL[task])), (
            question,
            answers,
        )
    whole = official(given, truths, OFFICIAL[task])
    assert mean(row["em"] for row in rows.values()) == pytest.approx(whole["em"])
    assert mean(row["f1"] for row in rows.values()) == pytest.approx(whole["f1"])


@pytest.mark.parametrize("task", OFFICIAL)
@pytest.mark.parametrize("answers", [["A", "Vitamin A"], ["The The"], ["!!!"], ["_"], [""], []])
def test_a_question_without_a_prediction_scores_0_whatever_its_answers(task, answers):
    assert score({}, {"q": answers}, NORMALIZERS[task]) == {"q": {"em": 0, "f1": 0}}


@pytest.mark.parametrize("task", OFFICIAL)
def test_an_article_that_is_the_answer_is_right(task):
    assert score({"q": "A"}, {"q": ["A", "Vitamin A"]}, NORMALIZERS[task])["q"]["em"] == 100
