"""Question answering: scorers against hand-made cases and a witness, spans against brute force, readers, windows."""

import gzip
import itertools
import json
import math
import random
import re
import time
import warnings
from dataclasses import replace

import pytest
import torch

from astbench.backbones.tokenizers import train_tokenizer
from astbench.errors import ConfigError, DataError
from astbench.tasks.qa import demo as qa_demo
from astbench.tasks.qa.data import SquadData, TriviaQAData
from astbench.tasks.qa.examples import QAExample
from astbench.tasks.qa.metrics import exact_match, f1_score, mean, normalize_squad, normalize_triviaqa, score
from astbench.tasks.qa.sources import fingerprint, read_triviaqa
from astbench.tasks.qa.task import best_spans, marginal_nll
from astbench.tasks.qa.windows import Collate, QADataset, Windower, find_mentions
from astbench.training.sampler import Draw
from tests.astbench.tasks.qa.reading import read_squad

# -- metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "triviaqa", "squad"),
    [
        ("The  Beatles!", "beatles", "beatles"),
        ("snow_white", "snow white", "snowwhite"),
        ("rock-n-roll", "rock n roll", "rocknroll"),
        ("‘Ulysses’ by `Joyce´", "ulysses by joyce", "‘ulysses’ by joyce´"),
        ("a an the A An THE", "", ""),
        ("theatre and anthem", "theatre and anthem", "theatre and anthem"),
        ("U.S.A.", "u s", "usa"),
        ("  ", "", ""),
        ("Café\u00a0Zoë", "café zoë", "café zoë"),
    ],
)
def test_official_normalisations(text, triviaqa, squad):
    assert normalize_triviaqa(text) == triviaqa
    assert normalize_squad(text) == squad


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1"),
    [
        ("the cat", "Cat", 1, 1),
        ("black cat", "cat", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("big black cat", "black cat sat", 0, 2 / 3),
    ],
)
def test_exact_match_and_f1(prediction, answer, em, f1):
    for normalize in (normalize_squad, normalize_triviaqa):
        assert exact_match(prediction, answer, normalize) == em
        assert f1_score(prediction, answer, normalize) == pytest.approx(f1)


def test_scores_take_the_best_alias_and_0_without_a_prediction():
    rows = score({"q1": "New York City"}, {"q1": ["NYC", "New York"], "q2": ["x"]}, normalize_triviaqa)
    assert rows["q1"] == {"em": 0, "f1": pytest.approx(80)}
    assert rows["q2"] == {"em": 0, "f1": 0}
    assert mean([]) == 0


def test_squad_scores_agree_with_torchmetrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        squad = pytest.importorskip("torchmetrics.functional.text").squad
    rng = random.Random(2)
    words = ["the", "a", "Red", "red,", "house", "of", "U.S.", "x_y", "‘q’", "1,000"]
    for _ in range(60):
        # "of" in each: where nothing but articles is left, torchmetrics scores as version 2 does, for no answer.
        guess, *answers = (" ".join(["of", *rng.choices(words, k=rng.randint(1, 4))]) for _ in range(4))
        rows = score({"q": guess}, {"q": answers}, normalize_squad)["q"]
        target = {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "q"}
        witness = squad([{"prediction_text": guess, "id": "q"}], [target])
        assert rows["em"] == pytest.approx(float(witness["exact_match"]))
        assert rows["f1"] == pytest.approx(float(witness["f1"]), abs=1e-4)


# -- spans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "longest"), [(1, 3), (7, 1), (13, 4), (13, 50)])
def test_best_span_is_the_brute_force_one(length, longest):
    torch.manual_seed(length)
    start, end = torch.randn(2, 5, length, dtype=torch.float64)
    answerable = torch.rand(5, length) < 0.7
    answerable[:, -1] = True
    values, firsts, lasts = best_spans(start, end, answerable, longest)
    for row in range(5):
        spans = {
            (i, j): float(start[row, i] + end[row, j])
            for i, j in itertools.product(range(length), repeat=2)
            if i <= j < i + longest and answerable[row, i] and answerable[row, j]
        }
        first, last = max(spans, key=spans.get)
        assert (int(firsts[row]), int(lasts[row])) == (first, last)
        assert float(values[row]) == pytest.approx(spans[first, last] - float(start[row, 0] + end[row, 0]))


def test_marginal_nll_is_the_written_out_one():
    logits = torch.tensor([[0.5, -1.0, 2.0, -math.inf], [1.0, 3.0, -math.inf, 0.0]], dtype=torch.float64)
    right = torch.tensor([[False, True, True, False], [True, False, False, False]])
    expected = 0.0
    for row, meant in zip(logits.tolist(), right.tolist(), strict=True):
        weights = [math.exp(x) for x in row]
        expected -= math.log(sum(w for w, m in zip(weights, meant, strict=True) if m) / sum(weights)) / 2
    assert float(marginal_nll(logits, right).mean()) == pytest.approx(expected)


def test_marginal_nll_has_finite_gradients_beside_masked_tokens():
    logits = torch.tensor([[0.5, -1.0, -math.inf]], requires_grad=True)
    marginal_nll(logits, torch.tensor([[False, True, False]])).sum().backward()
    assert logits.grad.isfinite().all()
    assert float(logits.grad[0, 2]) == 0


# -- mentions -------------------------------------------------------------------------------------------------


def example(context, answers=("Oster",), starts=None, question="Who was it?"):
    return QAExample("q", question, tuple(answers), context, "Title", starts)


@pytest.mark.parametrize(
    ("context", "answers", "starts", "texts"),
    [
        ("Bram Oster met Oster.", ["Oster"], None, ["Oster", "Oster"]),
        ("OSTER, oster; Osterland, Ostern-Oster", ["Oster"], None, ["OSTER", "oster", "Oster"]),
        ("New York City and New York", ["New York", "New York City"], None, ["New York City", "New York"]),
        ("He said C++ (and C).", ["C++"], None, ["C++"]),
        ("Bram Oster met Oster.", ["Oster", "Bram Oster"], (0,), ["Bram Oster"]),
        ("Bram Oster met Oster.", ["Oster"], (5, 15), ["Oster", "Oster"]),
        ("Bram Oster met Oster.", ["Oster"], (3,), []),
        ("nothing here", ["Oster"], None, []),
        ("", ["Oster"], None, []),
        ("padded Oster", ["  Oster  "], None, ["Oster"]),
    ],
)
def test_mentions(context, answers, starts, texts):
    assert [context[a:b] for a, b in find_mentions(example(context, answers, starts))] == texts


def test_mentions_are_found_in_every_spelling_that_a_regular_expression_takes_for_one():
    """Aliases that cannot stand in the document are left out first: none that can may be."""
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    cased = [c for c in letters if len({c, c.lower(), c.upper(), c.casefold(), c.swapcase()}) > 1]
    everything = " ".join(cased)
    for letter in [*"iIıİſKµ", *cased[::12]]:
        found = find_mentions(example(everything, [letter]))
        wanted = re.finditer(rf"(?<!\w)(?:{re.escape(letter)})(?!\w)", everything, re.IGNORECASE)
        assert found == [match.span() for match in wanted], hex(ord(letter))


def test_a_hundred_thousand_aliases_take_seconds():
    document = "Bram Oster met the mayor of alias 77 in the old town. " * 300
    started = time.process_time()
    found = find_mentions(example(document, [*(f"alias {n} of many" for n in range(100_000)), "Alias 77"]))
    assert len(found) == 300 and time.process_time() - started < 15


# -- windows --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return qa_demo.generate("train", 12)


@pytest.fixture(scope="module")
def tokenizer(demo):
    return train_tokenizer((text for e in demo for text in (e.question, e.context)), 600)


def test_windows_cover_the_document_and_overlap_by_the_stride(demo, tokenizer):
    windower = Windower(tokenizer, max_length=100, stride=17, max_question=40)
    for e in demo[:4]:
        windows = windower.windows(e)
        assert all(len(w.input_ids) <= 100 for w in windows)
        spans = [[s for s in w.offsets if s is not None] for w in windows]
        for before, after in itertools.pairwise(spans):
            assert before[-17:] == after[:17]
        together = spans[0] + [s for stretch in spans[1:] for s in stretch[17:]]
        whole = tokenizer(e.context, add_special_tokens=False, return_offsets_mapping=True)
        assert together == [tuple(s) for s in whole["offset_mapping"]]


def test_offsets_give_back_the_text_and_marks_the_answer(demo, tokenizer):
    windower = Windower(tokenizer, max_length=100, stride=30, max_question=40)
    for e in demo:
        marked = [w for w in windower.windows(e) if w.starts]
        assert marked
        for window in marked:
            assert len(window.starts) == len(window.ends) == 1
            text = e.context[window.offsets[window.starts[0]][0] : window.offsets[window.ends[0]][1]]
            assert text in e.answers
            ids = window.input_ids[window.starts[0] : window.ends[0] + 1]
            assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("##", "") == text.lower().replace(" ", "")


def test_a_mention_cut_at_the_windows_border_is_no_positive(tokenizer):
    words = ["the"] * 30
    words[13:15] = ["Bram", "Oster"]
    e = example(" ".join(words), ["Bram Oster"], question="the")
    tokens_of_name = len(tokenizer("Bram Oster", add_special_tokens=False)["input_ids"])
    assert tokens_of_name > 1
    for max_length in range(12, 30):
        windower = Windower(tokenizer, max_length=max_length, stride=2, max_question=4)
        for window in windower.windows(e):
            stretch = [s for s in window.offsets if s]
            begin, end = find_mentions(e)[0]
            whole = stretch[0][0] <= begin and end <= stretch[-1][1]
            assert bool(window.starts) == bool(window.ends) == whole


def test_long_questions_are_cut(tokenizer):
    e = example("Bram Oster was born in Rookwell.", question="Who was the very first of all? " * 30)
    window = Windower(tokenizer, max_length=60, stride=5, max_question=11).windows(e)[0]
    question = window.input_ids[1 : window.input_ids.index(tokenizer.sep_token_id)]
    assert question == tokenizer(e.question, add_special_tokens=False)["input_ids"][:11]
    assert any(window.offsets)


@pytest.mark.parametrize("context", ["", "   \n "])
def test_a_document_without_a_token_has_no_window(tokenizer, context):
    assert Windower(tokenizer, 60, 5, 11).windows(example(context)) == []


def test_a_document_of_one_word(tokenizer):
    windows = Windower(tokenizer, 60, 5, 11).windows(example("Oster"))
    assert len(windows) == 1 and windows[0].starts


def test_collate_pads_and_marks(tokenizer):
    windower = Windower(tokenizer, 60, 5, 11)
    rows = [
        {"index": 7, "window": windower.windows(example("Bram Oster met the king."))[0]},
        {"index": 3, "window": windower.windows(example("Nobody."))[0]},
    ]
    batch = Collate(tokenizer.pad_token_id)(rows)
    sizes = [len(row["window"].input_ids) for row in rows]
    assert batch["input_ids"].shape == (2, max(sizes))
    assert batch["attention_mask"].sum(1).tolist() == sizes
    assert (batch["input_ids"][~batch["attention_mask"]] == tokenizer.pad_token_id).all()
    assert batch["index"].tolist() == [7, 3]
    assert batch["answerable"][0].tolist()[: sizes[0]] == [s is not None for s in rows[0]["window"].offsets]
    assert batch["starts"][0].nonzero().flatten().tolist() == list(rows[0]["window"].starts)
    # "Not in this window" is the first token.
    assert batch["starts"][1].nonzero().tolist() == batch["ends"][1].nonzero().tolist() == [[0]]
    assert not (batch["answerable"] & ~batch["attention_mask"]).any()


def test_draws_depend_only_on_seed_epoch_and_index(demo, tokenizer):
    def draws(seed, items):
        dataset = QADataset(demo, Windower(tokenizer, 100, 30, 40), negative_share=0.5, seed=seed, training=True)
        return {item: dataset[Draw(*item)]["window"] for item in items}

    items = list(itertools.product(range(6), range(len(demo))))
    forward = draws(1, items)
    assert draws(1, list(reversed(items))) == forward
    assert draws(2, items) != forward
    first, second = ([w for (epoch, _), w in forward.items() if epoch == e] for e in (0, 1))
    assert first != second


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_negative_share(demo, tokenizer, share):
    dataset = QADataset(demo, Windower(tokenizer, 100, 30, 40), negative_share=share, seed=1, training=True)
    assert {bool(dataset[Draw(0, i)]["window"].starts) for i in range(len(demo))} == {share == 0.0}


def test_evaluation_lists_every_window_of_every_question(demo, tokenizer):
    windower = Windower(tokenizer, 100, 30, 40)
    dataset = QADataset(demo, windower, negative_share=0.5, seed=1, training=False)
    assert len(dataset) == sum(len(windower.windows(e)) for e in demo)
    assert [dataset[i]["index"] for i in range(len(dataset))] == sorted(
        dataset[i]["index"] for i in range(len(dataset))
    )


# -- readers --------------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    """TriviaQA in its official layout: two questions, three pages."""
    evidence = tmp_path / "evidence" / "wikipedia"
    evidence.mkdir(parents=True)
    for page, text in {"A": "Page A. Oster.", "B": "Page B.", "C": "Page C, Vintar."}.items():
        (evidence / f"{page}.txt").write_text(text)
    (tmp_path / "qa").mkdir()
    write_official(tmp_path, [question(0, ["A", "B"], "Oster"), question(1, ["C"], "Vintar")])
    return tmp_path


def question(number, pages, answer):
    return {
        "QuestionId": f"tc_{number}",
        "Question": f"Question {number}?",
        "Answer": {"Value": answer, "Aliases": [answer, answer.upper()], "HumanAnswers": ["h"]},
        "EntityPages": [{"Filename": f"{p}.txt", "Title": f"Page {p}"} for p in pages],
    }


def write_official(folder, data, split="train"):
    (folder / "qa" / f"wikipedia-{split}.json").write_text(json.dumps({"Data": data}))


def test_official_triviaqa(official):
    assert read_triviaqa(official, "train") == [
        QAExample("tc_0", "Question 0?", ("Oster", "OSTER", "h"), "Page A. Oster.\n\nPage B.", "Page A"),
        QAExample("tc_1", "Question 1?", ("Vintar", "VINTAR", "h"), "Page C, Vintar.", "Page C"),
    ]
    with pytest.raises(DataError, match="has no validation split"):
        read_triviaqa(official, "validation")
    write_official(official, [question(0, ["A"], "Oster")], "dev")
    assert len(read_triviaqa(official, "validation")) == 1


@pytest.mark.parametrize("name", ["../../secret", "../wikipedia/../../secret", "missing"])
def test_evidence_outside_its_folder_is_refused(official, name):
    (official / "secret.txt").write_text("secret")
    write_official(official, [question(0, [name], "x")])
    with pytest.raises(DataError, match=r"question 1: evidence .* does not exist"):
        read_triviaqa(official, "train")


def test_evidence_by_absolute_path_is_refused(official):
    (official / "secret.txt").write_text("secret")
    write_official(official, [question(0, [f"{official}/secret"], "x")])
    with pytest.raises(DataError, match="does not exist"):
        read_triviaqa(official, "train")


@pytest.mark.parametrize("gone", ["QuestionId", "Question", "Answer", "EntityPages"])
def test_missing_fields_name_the_question(official, gone):
    row = question(0, ["A"], "x")
    del row[gone]
    write_official(official, [question(1, ["A"], "y"), row])
    with pytest.raises(DataError, match=f"question 2: column '{gone}' is missing"):
        read_triviaqa(official, "train")


def hub_row(number=0, **changes):
    row = {
        "question_id": f"tc_{number}",
        "question": "Who?",
        "answer": {"value": "Oster", "aliases": ["Oster", "Bram Oster"]},
        "entity_pages": {"title": ["A", "B"], "wiki_context": ["Bram Oster.", "More."]},
    }
    return {**row, **changes}


def write_table(folder, rows, name):
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_tables_with_the_hubs_columns(tmp_path, name):
    write_table(tmp_path, [hub_row(0), hub_row(1)], name)
    examples = read_triviaqa(tmp_path, "train")
    assert [e.question_id for e in examples] == ["tc_0", "tc_1"]
    assert examples[0] == QAExample("tc_0", "Who?", ("Oster", "Bram Oster"), "Bram Oster.\n\nMore.", "A")


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
@pytest.mark.parametrize("column", ["question_id", "question", "answer", "entity_pages"])
def test_missing_columns_are_named(tmp_path, name, column):
    row = hub_row()
    del row[column]
    write_table(tmp_path, [row], name)
    with pytest.raises(DataError, match=f"column '{column}' is missing"):
        read_triviaqa(tmp_path, "train")


def test_a_question_without_any_answer_is_refused(tmp_path):
    write_table(tmp_path, [hub_row(answer={"value": " ", "aliases": []})], "train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl:1: no answer"):
        read_triviaqa(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_truncated_tables_are_one_data_error(tmp_path, name):
    path = write_table(tmp_path, [hub_row(n, question=f"Q{n}" * 40) for n in range(30)], name)
    path.write_bytes(path.read_bytes()[:-37])
    with pytest.raises(DataError, match=r"cannot be (read|unpacked)") as caught:
        read_triviaqa(tmp_path, "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_official_json_is_one_data_error(official):
    file = official / "qa" / "wikipedia-train.json"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_triviaqa(official, "train")
    file.write_text("[]")
    with pytest.raises(DataError, match="not TriviaQA's official format"):
        read_triviaqa(official, "train")


@pytest.mark.parametrize(("path", "message"), [("", "needs --data.path"), ("/nowhere/x", "does not exist")])
def test_missing_paths(path, message):
    for read in (lambda: read_triviaqa(path, "train"), lambda: read_squad(path)):
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("entity_pages", "wiki_context"), "one text", "'wiki_context' is of the wrong form: 'one text'"),
        (("entity_pages", "wiki_context"), ["a", None], "'wiki_context' must be a list of texts"),
        (("entity_pages", "title"), [None], "'title' must be a list of texts"),
        (("answer", "aliases"), "abc", "'aliases' is of the wrong form: 'abc'"),
        (("answer", "aliases"), None, "'aliases' is of the wrong form"),
        (("answer",), [], "'answer' is of the wrong form"),
        (("question",), None, "'question' is of the wrong form"),
    ],
)
def test_values_of_the_wrong_form_name_file_line_and_column(tmp_path, place, value, message):
    row = {
        "question_id": "1",
        "question": "Who?",
        "answer": {"value": "A", "aliases": ["A"]},
        "entity_pages": {"title": ["T"], "wiki_context": ["A was."]},
    }
    good = json.dumps(row)
    inner = row
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "train.jsonl").write_text(good + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:2: column " + message):
        read_triviaqa(tmp_path, "train")


def test_a_cut_line_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question_id": "1"')
    with pytest.raises(DataError, match=r"train\.jsonl:1 cannot be read"):
        read_triviaqa(tmp_path, "train")


def test_half_a_surrogate_pair_is_named(demo):
    broken = replace(demo[0], question="\ud800 what?")
    with pytest.raises(DataError, match="not valid Unicode"):
        fingerprint([broken])


def squad_json(articles=3):
    context = " Bram Oster met Ada Vintar. "
    return {
        "data": [
            {
                "title": f"Article {a}",
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": f"{a}-1",
                                "question": " Who met Ada? ",
                                "answers": [
                                    {"text": "Bram Oster", "answer_start": 1},
                                    {"text": "Oster", "answer_start": 6},
                                    {"text": "Bram Oster", "answer_start": 1},
                                ],
                            },
                            {"id": f"{a}-2", "question": "Impossible?", "answers": []},
                        ],
                    }
                ],
            }
            for a in range(articles)
        ]
    }


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_squad(tmp_path, name):
    text = json.dumps(squad_json()).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    for path in (tmp_path, tmp_path / name):
        examples = read_squad(path)
        assert [e.question_id for e in examples] == ["0-1", "1-1", "2-1"]
    first = examples[0]
    assert (first.question, first.answers, first.answer_starts) == ("Who met Ada?", ("Bram Oster", "Oster"), (1, 6))
    assert [first.context[a:b] for a, b in find_mentions(first)] == ["Bram Oster", "Oster"]


def test_squad_problems(tmp_path):
    with pytest.raises(DataError, match="found 0"):
        read_squad(tmp_path)
    file = tmp_path / "a.json"
    for text, message in (("{", "cannot be read"), ("[1]", "not SQuAD's"), ('{"data": [{}]}', "not SQuAD's")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_squad(file)


def test_squad_holds_whole_articles_out(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(squad_json(9)))
    data = SquadData("local", str(tmp_path), holdout=4)
    titles = {split: {e.title for e in data.read(split)} for split in ("train", "validation")}
    assert titles["validation"] == {"Article 0", "Article 4", "Article 8"}
    assert len(titles["train"]) == 6 and not titles["train"] & titles["validation"]


def test_squad_of_one_article_cannot_train(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(squad_json(1)))
    data = SquadData("local", str(tmp_path))
    with pytest.raises(DataError, match="holds one article, and articles are held out whole"):
        data.read("train")
    assert {e.title for e in data.read("validation")} == {"Article 0"}


def test_squad_articles_without_titles_are_still_held_out_whole(tmp_path):
    data = squad_json(9)
    for article in data["data"]:
        article["title"] = ""
    (tmp_path / "dev.json").write_text(json.dumps(data))
    squad = SquadData("local", str(tmp_path), holdout=4)
    assert {e.question_id for e in squad.read("validation")} == {"0-1", "4-1", "8-1"}


def test_squad_by_whole_articles(tmp_path):
    data = squad_json(2)
    for article in data["data"]:
        paragraph = article["paragraphs"][0]
        later = {**paragraph, "qas": [{**q, "id": f"{q['id']}-later"} for q in paragraph["qas"]]}
        article["paragraphs"].append(later)
    (tmp_path / "dev.json").write_text(json.dumps(data))
    first, later, *_ = SquadData("local", str(tmp_path), holdout=2, whole_articles=True).read("train")
    assert first.context == later.context and first.context.count("Bram Oster") == 2
    for example in (first, later):
        assert [example.context[a:b] for a, b in find_mentions(example)] == ["Bram Oster", "Oster"]
    assert later.answer_starts[0] > first.answer_starts[1]
    with pytest.raises(ConfigError, match="source=local"):
        SquadData("hub", whole_articles=True)


def test_fingerprint_sees_everything(demo):
    digest = fingerprint(demo)
    assert fingerprint(list(demo)) == digest
    assert fingerprint(demo[::-1]) != digest
    assert fingerprint(demo[:-1]) != digest


# -- data modules -----------------------------------------------------------------------------------------------


def local(tmp_path, train, validation, **options):
    write_table(tmp_path, train, "train.jsonl")
    write_table(tmp_path, validation, "validation.jsonl")
    return TriviaQAData("local", str(tmp_path), max_length=64, stride=8, max_question=16, **options)


def page(text):
    return {"title": ["A"], "wiki_context": [text]}


def test_empty_documents_and_questions_without_an_answer_are_told(tmp_path):
    rows = [hub_row(0), hub_row(1, entity_pages=page("")), hub_row(2, entity_pages=page("Nobody at all."))]
    data = local(tmp_path, rows, rows)
    data.setup("fit")
    assert data.notes == [
        "1 of 3 training documents are empty: left out",
        "1 of 2 train questions have no answer in their document: trained as 'not here'",
        "2 of 3 validation questions have no answer in their document: scored as any other",
    ]
    assert len(data.sets["train"]) == 2
    assert data.describe()["questions"] == {"train": 3, "validation": 3}


def test_ids_that_come_again_and_questions_that_are_cut_are_told(tmp_path):
    rows = [hub_row(0), hub_row(0, question="What is it? " * 20), hub_row(1)]
    data = local(tmp_path, rows, rows)
    data.setup("fit")
    assert data.notes == [
        "1 of 3 train questions have the id of another: numbered #2, ...",
        "1 of 3 validation questions have the id of another: numbered #2, ...",
        "1 of 3 train questions are cut to 16 tokens; --data.max_question allows more",
        "1 of 3 validation questions are cut to 16 tokens; --data.max_question allows more",
    ]
    assert [e.question_id for e in data.examples["train"]] == ["tc_0", "tc_0#2", "tc_1"]


@pytest.mark.parametrize("nothing", [" ", "\u200b\u200d"], ids=["space", "invisible"])
def test_nothing_but_empty_documents_is_an_error(tmp_path, nothing):
    empty = [hub_row(0, entity_pages=page(nothing))]
    with pytest.raises(DataError, match="every training document is empty"):
        local(tmp_path, empty, [hub_row(0)]).setup("fit")
    with pytest.raises(DataError, match="no document of the validation split holds any text"):
        local(tmp_path, [hub_row(0)], empty).setup("fit")


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(DataError, match="the validation split of source local holds no question"):
        local(tmp_path, [hub_row(0)], []).setup("fit")


def test_windows_must_have_room_for_the_document():
    with pytest.raises(ConfigError, match=r"--data.stride=128 must be below"):
        TriviaQAData(max_length=160, stride=128, max_question=32)


def test_limits(tmp_path):
    data = local(tmp_path, [hub_row(n) for n in range(9)], [hub_row(n) for n in range(9)], max_train=5, max_eval=2)
    data.setup("fit")
    assert {s: len(e) for s, e in data.examples.items()} == {"train": 5, "validation": 2}


def test_question_and_document_have_their_own_token_types():
    """A tokenizer that leaves them out by default once cost the demo its learnability."""
    example = qa_demo.generate("validation", 1, paragraphs=1)[0]
    tokenizer = train_tokenizer([example.question, example.context], 8192)
    for window in Windower(tokenizer, 64, 8, 40).windows(example):
        real = [kind for kind, span in zip(window.token_type_ids, window.offsets, strict=True) if span is not None]
        assert set(real) == {1}
        assert window.token_type_ids[1] == 0
