"""JSON of other types than the formats say: every field of every reader is taken, or refused by file and question."""

import copy
import json

import pytest

from astbench.errors import DataError
from astbench.tasks.qa.data import SquadData, TriviaQAData
from astbench.tasks.qa.sources import fingerprint, read_triviaqa
from astbench.tasks.qa.windows import find_mentions
from tests.astbench.tasks.qa.reading import read_squad

NESTED = json.loads("[" * 400 + "]" * 400)
VALUES = [None, True, False, 0, -1, 7, 10**30, 1.0, 1.5, float("nan"), float("inf"), "", " ", "x", "\ud800", "a\0b"]
VALUES += [[], [None], [1], ["x"], [[]], {}, {"a": 1}, NESTED]


def squad():
    first = {"id": "q0", "question": "Who?", "answers": [{"text": "Bram", "answer_start": 0}]}
    none = {"id": "n0", "question": "When?", "is_impossible": True, "answers": [], "plausible_answers": []}
    paragraph = {"context": "Bram Oster met Ada.", "qas": [first, none]}
    return {"version": "2.0", "data": [{"title": "T", "paragraphs": [paragraph]}, {"title": "U", "paragraphs": []}]}


def row():
    pages = {"title": ["A"], "wiki_context": ["Bram Oster."]}
    answer = {"value": "Bram", "aliases": ["Bram Oster"]}
    return {"question_id": "1", "question": "Who?", "answer": answer, "entity_pages": pages, "more": 1}


def official():
    page = {"DocSource": "Search", "Filename": "A.txt", "Title": "A"}
    answer = {"Value": "Bram", "Aliases": ["Bram Oster"], "HumanAnswers": ["B"], "Type": "x"}
    item = {"QuestionId": "1", "Question": "Who?", "Answer": answer, "EntityPages": [page], "SearchResults": []}
    return {"Data": [item], "Split": "train"}


def write_squad(folder, data):
    (folder / "dev.json").write_text(json.dumps(data))
    return read_squad(folder)


def write_row(folder, data):
    (folder / "train.jsonl").write_text(f"{json.dumps(row())}\n{json.dumps(data)}\n")
    return read_triviaqa(folder, "train")


def write_official(folder, data):
    (folder / "evidence/wikipedia").mkdir(parents=True, exist_ok=True)
    (folder / "evidence/wikipedia/A.txt").write_text("Bram Oster.")
    (folder / "wikipedia-train.json").write_text(json.dumps(data))
    return read_triviaqa(folder, "train")


FORMATS = {
    "squad": (squad, write_squad, "dev.json"),
    "row": (row, write_row, "train.jsonl:2"),
    "official": (official, write_official, "wikipedia-train.json"),
}


def places(data, at=()):
    """The path of every value, the whole first."""
    yield at
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        yield from places(value, (*at, key))


def with_value(data, place, change):
    """A copy in which `change(container, key)` was called for the place."""
    top = [copy.deepcopy(data)]
    container = top
    for key in (0, *place)[:-1]:
        container = container[key]
    change(container, (0, *place)[-1])
    return top


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_of_another_type_is_taken_or_refused_by_name(tmp_path, name):
    make, read, file = FORMATS[name]
    taken = refused = 0
    for place in places(make()):
        for value in VALUES:
            (data,) = with_value(make(), place, lambda container, key, value=value: container.__setitem__(key, value))
            try:
                examples = read(tmp_path, data)
                fingerprint(examples)
                assert all(find_mentions(e) is not None for e in examples), (place, value)
                assert all(isinstance(e.question_id, str) and isinstance(e.title, str) for e in examples)
                taken += 1
            except DataError as error:
                assert file in str(error) and "\n" not in str(error) and len(str(error)) < 500, (place, value)
                assert len(place) < 3 or name == "row" or "question" in str(error) or "article" in str(error)
                refused += 1
    assert taken > 30 and refused > 100


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_may_be_missing(tmp_path, name):
    make, read, file = FORMATS[name]
    for place in list(places(make()))[1:]:
        (data,) = with_value(make(), place, lambda container, key: container.__delitem__(key))
        try:
            fingerprint(read(tmp_path, data))
        except DataError as error:
            assert file in str(error), place


@pytest.mark.parametrize(("name", "unread"), [("squad", 2), ("row", 1), ("official", 4)])
def test_a_key_that_comes_again_has_no_value(tmp_path, name, unread):
    """Python's own reader takes the last one: another answer to score against, or another list of questions."""
    make, read, file = FORMATS[name]
    keys = {place[-1] for place in places(make()) if place and isinstance(place[-1], str)}
    expected, taken = read(tmp_path, make())[-1:], 0
    for key in keys:
        text = json.dumps(make()).replace(f'"{key}":', f'"{key}": "other", "{key}":')
        path = tmp_path / file.partition(":")[0]
        path.write_text(text)
        try:
            again = read_squad(tmp_path) if name == "squad" else read_triviaqa(tmp_path, "train")
            assert again == expected
            taken += 1
        except DataError as error:
            assert path.name in str(error) and key in str(error)
    assert taken == unread


def test_times_far_away_in_parquet_are_refused_by_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([row()])
    for kind, value in (("timestamp", 10**15), ("duration", 2**62)):
        column = pyarrow.array([value], getattr(pyarrow, kind)("s"))
        pytest.importorskip("pyarrow.parquet").write_table(
            table.append_column("asked", column), tmp_path / "train.parquet"
        )
        with pytest.raises(DataError, match=r"train\.parquet cannot be read"):
            read_triviaqa(tmp_path, "train")


@pytest.mark.parametrize("value", [51870, 51870.0, "51870"])
def test_ids_may_be_numbers(tmp_path, value):
    for name, place in (("squad", ("data", 0, "paragraphs", 0, "qas", 0, "id")), ("row", ("question_id",))):
        make, read, _ = FORMATS[name]
        (data,) = with_value(make(), place, lambda container, key: container.__setitem__(key, value))
        assert read(tmp_path, data)[-1].question_id == "51870"


def test_a_whole_float_counts_characters(tmp_path):
    data = squad()
    data["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 0.0
    assert write_squad(tmp_path, data)[0].answer_starts == (0,)


# -- questions without an answer ---------------------------------------------------------------------------------------


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path):
    data = {"data": squad()["data"] * 4}
    empty = {"id": "e", "question": "Where?", "answers": [{"text": " ", "answer_start": -1}]}
    said = {**empty, "is_impossible": True, "answers": [{"text": "Bram", "answer_start": 0}]}
    data["data"][0]["paragraphs"][0]["qas"] += [empty, said]
    write_squad(tmp_path, data)
    squads = SquadData("local", str(tmp_path), holdout=2)
    for split in ("train", "validation"):
        assert [e.question_id for e in squads.read(split)] == ["q0", "q0"]
    # Each is in the file four times over; told once, for both splits.
    assert squads.notes == [f"12 of 16 questions of {tmp_path / 'dev.json'} have no answer: left out"]


# -- splits ------------------------------------------------------------------------------------------------------------


def test_each_split_of_triviaqa_is_its_own_file(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row(), "question_id": name}))
    data = TriviaQAData("local", str(tmp_path))
    assert [data.read(split)[0].question_id for split in ("train", "validation", "test")] == [
        "train",
        "validation",
        "test",
    ]
    data.setup("test")
    assert [e.question_id for e in data.examples["test"]] == ["test"] and data.notes == []
    on_test = TriviaQAData("local", str(tmp_path), eval_split="test")
    on_test.setup("fit")
    assert on_test.sets.keys() == {"train", "test"}


def test_the_official_test_file_is_read_where_it_has_answers(tmp_path):
    write_official(tmp_path, official())
    (tmp_path / "wikipedia-test.json").write_text(json.dumps(official()))
    assert len(read_triviaqa(tmp_path, "test")) == 1


def test_a_split_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row()))
    (tmp_path / "dev.jsonl").write_text(json.dumps(row()))
    with pytest.raises(DataError, match=r"has no test split; looked for .*; astbench validate"):
        TriviaQAData("local", str(tmp_path)).setup("test")
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no validation split; .* --data\.eval_split=test"):
        TriviaQAData("local", str(tmp_path)).setup("fit")
    for data in (TriviaQAData("hub"), SquadData("hub")):
        with pytest.raises(DataError, match=r"test answers of \w+ are not public"):
            data.read("test")


def test_squad_files_named_after_their_splits(tmp_path):
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        data = squad()
        data["data"][0]["paragraphs"][0]["qas"][0]["id"] = name
        (tmp_path / name).write_text(json.dumps(data))
    data = SquadData("local", str(tmp_path))
    assert [data.read(split)[0].question_id for split in ("train", "validation")] == [
        "train-v1.1.json",
        "dev-v1.1.json",
    ]
    with pytest.raises(DataError, match="says test for the test split"):
        data.read("test")
    (tmp_path / "test.json").write_text(json.dumps(squad()))
    assert data.read("test")[0].question_id == "q0"
    with pytest.raises(DataError, match="has no test split: of one file"):
        SquadData("local", str(tmp_path / "test.json")).read("test")


def test_a_number_for_an_id_that_comes_again_is_nobody_elses(tmp_path):
    ids = ["x", "x", "x#2", "x"]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({**row(), "question_id": i}) for i in ids))
    (tmp_path / "validation.jsonl").write_text(json.dumps(row()))
    data = TriviaQAData("local", str(tmp_path))
    data.setup("fit")
    assert len({e.question_id for e in data.examples["train"]}) == 4
