"""The generated question-answering data: same bytes, real in form, nothing given away early."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import pytest

from astbench.tasks.qa import demo as qa_demo
from astbench.tasks.qa.examples import QAExample


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def mention(example: QAExample) -> str:
    assert example.answer_starts is not None
    (start,) = example.answer_starts
    return max((a for a in example.answers if example.context.startswith(a, start)), key=len)


@pytest.fixture(scope="module")
def examples() -> list[QAExample]:
    return qa_demo.generate("validation", 400)


def test_same_arguments_same_bytes() -> None:
    text = repr(qa_demo.generate("train", 7, seed=3))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "f3980e20e1a27e9026042db432caf991d4202bc4f5ff8bada9be2219f7cbfcb0"
    )


def test_more_questions_only_append() -> None:
    assert qa_demo.generate("train", 11)[:5] == qa_demo.generate("train", 5)


def test_splits_and_seeds_differ() -> None:
    contexts = [
        {e.context for e in qa_demo.generate(split, 100, seed=seed)}
        for split, seed in (("train", 0), ("validation", 0), ("test", 0), ("train", 1))
    ]
    assert len(set.union(*contexts)) == sum(len(c) for c in contexts)


def test_question_ids_are_unique(examples: list[QAExample]) -> None:
    assert len({e.question_id for e in examples}) == len(examples)


def test_the_answer_is_mentioned_once(examples: list[QAExample]) -> None:
    for example in examples:
        found = mention(example)
        (start,) = example.answer_starts or ()
        rest = example.context[:start] + "|" + example.context[start + len(found) :]
        for answer in example.answers:
            assert not re.search(rf"\b{re.escape(answer)}\b", rest), (answer, example)


def test_full_length_articles(examples: list[QAExample]) -> None:
    lengths = [len(e.context.split()) for e in examples]
    assert min(lengths) >= 200 and max(lengths) <= 450
    assert max(len(tokens(e.context)) + len(tokens(e.question)) + 3 for e in examples) <= 512


def test_fewer_paragraphs_are_shorter() -> None:
    for count in (1, 2, 3):
        contexts = [e.context for e in qa_demo.generate("train", 20, paragraphs=count)]
        assert {c.count("\n") for c in contexts} == {count}


def test_vocabulary_is_small_and_shared(examples: list[QAExample]) -> None:
    train = {w for e in qa_demo.generate("train", 4000) for w in tokens(e.context + " " + e.question)}
    assert len(train) < 1300
    assert {w for e in examples for w in tokens(e.context + " " + e.question)} <= train


def test_openings_say_nothing_for_fifteen_tokens(examples: list[QAExample]) -> None:
    for example in examples:
        opening = next(o for o in qa_demo._OPENINGS if example.question.startswith(o))
        assert len(tokens(opening)) >= 15


def test_facts_fit_in_twenty_tokens(examples: list[QAExample]) -> None:
    for example in examples:
        (start,) = example.answer_starts or ()
        before = re.split(r"(?<=\.)\s", example.context[:start])[-1]
        after = re.split(r"(?<=\.)\s", example.context[start:])[0]
        assert len(tokens(before + after)) <= 20


def test_some_answers_have_aliases_and_some_mentions_are_aliases(examples: list[QAExample]) -> None:
    assert any(len(e.answers) > 1 for e in examples)
    assert any(mention(e) != e.answers[0] for e in examples)


@pytest.mark.parametrize("paragraphs", [0, 9, (3, 2), (0, 4)])
def test_refuses_impossible_paragraphs(paragraphs: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="paragraphs"):
        qa_demo.generate("train", 1, paragraphs=paragraphs)


def test_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="num_questions"):
        qa_demo.generate("train", -1)


def test_needs_no_torch() -> None:
    code = "import sys, astbench.tasks.qa.demo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
