"""One policy for text, held in every reader of data: line ends, marks, Unicode's forms, and what is refused."""

import json
import unicodedata
from dataclasses import astuple, is_dataclass
from itertools import cycle

import pytest
from PIL import Image

from astbench.errors import DataError
from astbench.files.text import json_lines, lines, plain, read_text
from astbench.tasks.base import asked_text
from astbench.tasks.lm.sources import read_local
from astbench.tasks.lra import sources as lra
from astbench.tasks.mt.sources import read_parallel, read_sentences, read_table
from astbench.tasks.qa.sources import read_triviaqa
from astbench.tasks.qa.windows import find_mentions
from tests.astbench.tasks.qa.reading import read_squad

# -- every reader, its files as text (`@` is where a test puts a character), and what it makes of them ----------------

WIKI = " = Café = \n \n A ship@and a café . \n\n = = Life = = \n \n It ends . \n"
SENTENCES = "A dog@runs to the café.\n\nLast one.\n"
TABLE = "Go@on, café.\tGeh@weiter.\tCC-BY\n\nRun.\tLauf, Käfer.\tCC-BY\n"
LISTOPS = "Source\tTarget\n( [MAX@2 ) 9 ]\t9\n\n7\t7\n"
AAN = "1.0\ta1\tb1\tA@paper on cafés\tand its pair\n\n0\ta2\tb2\tshort\tlonger é\n"
REVIEW = "A film@set in a café.\nGood.\n"
PATHFINDER = "imgs/0 a.png 0 1@1.0\nimgs/0 b.png 1 0 1.0\n"


def question(form="NFC"):
    context = unicodedata.normalize(form, "In a café@Zoë met Bram Oster.")
    return context, context.index("Bram")


def json_text(data, **options):
    return json.dumps(data, ensure_ascii=False, **options)


def squad(form):
    context, start = question(form)
    asked = {"id": "q", "question": "Whom@?", "answers": [{"text": "Bram Oster", "answer_start": start}]}
    paragraphs = [{"context": context, "qas": [asked]}]
    return json_text({"data": [{"title": "Café", "paragraphs": paragraphs}]}, indent=1) + "\n"


def row(form):
    context, _ = question(form)
    pages = {"title": ["Café"], "wiki_context": [context, "More."]}
    one = {"question_id": "1", "question": "Who@?", "answer": {"value": "Zoë", "aliases": []}, "entity_pages": pages}
    return f"{json_text(one)}\n\n{json_text({**one, 'question_id': 2})}\n"


def official(form):
    page = {"Filename": "A.txt", "Title": "Café"}
    one = {"QuestionId": "1", "Question": "Who@?", "Answer": {"Value": "Zoë", "Aliases": []}, "EntityPages": [page]}
    return json_text({"Data": [one]}, indent=1)


READERS = {
    "wikitext": ({"wiki.test.raw": WIKI}, lambda f: read_local(str(f), "test").text),
    "wikitext-file": ({"my.txt": WIKI}, lambda f: read_local(str(f / "my.txt"), "test").text),
    "parallel": ({"t.en": SENTENCES, "t.de": SENTENCES}, lambda f: read_parallel(f, "t", "train_name")),
    "sentences": ({"in.txt": SENTENCES}, lambda f: read_sentences(f / "in.txt")),
    "table": ({"deu.txt": TABLE}, lambda f: read_table(f / "deu.txt")),
    "json-lines": ({"train.jsonl": row}, lambda f: read_triviaqa(f, "train")),
    "squad": ({"dev.json": squad}, lambda f: [(e, find_mentions(e)) for e in read_squad(f / "dev.json")]),
    "triviaqa": (
        {"qa/wikipedia-train.json": official, "evidence/wikipedia/A.txt": REVIEW},
        lambda f: read_triviaqa(f, "train"),
    ),
    "listops": ({"basic_train.tsv": LISTOPS}, lambda f: lra.read_listops(f, "train", 99)),
    "aan": ({"aan.train.tsv": AAN}, lambda f: lra.read_aan(f, "train", 99)),
    "imdb": ({"train/neg/0.txt": REVIEW, "train/pos/0.txt": REVIEW}, lambda f: lra.read_imdb(f, "train", 99)),
    "pathfinder": ({"curv_baseline/metadata/0.npy": PATHFINDER}, lambda f: lra.read_pathfinder(f, 6)),
    "prompt": ({"prompt.txt": WIKI}, lambda f: asked_text("prompt_file", str(f / "prompt.txt"))),
}
JSON = ("json-lines", "squad", "triviaqa")


def strings(found):
    """Everything in what was read, as text, in order, its structure kept."""
    if isinstance(found, bytes):
        return found.decode()
    if is_dataclass(found):
        found = astuple(found)
    return [strings(part) for part in found] if isinstance(found, list | tuple) else str(found)


def read_back(folder, reader, change=str.encode, form="NFC", put=" "):
    files, read = READERS[reader]
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = text(form) if callable(text) else unicodedata.normalize(form, text)
        file.write_bytes(change(text.replace("@", put)))
    if reader == "pathfinder":
        (folder / "curv_baseline/imgs/0").mkdir(parents=True, exist_ok=True)
        for grey, name in enumerate("ab"):
            Image.new("L", (32, 32), grey).save(folder / f"curv_baseline/imgs/0/{name}.png")
    return strings(read(folder))


def mixed(text):
    """Each line with another end than the one before."""
    first, *others = text.split("\n")
    return first + "".join(end + line for end, line in zip(cycle(["\n", "\r", "\r\n"]), others, strict=False))


SAME = {
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "mixed": lambda text: mixed(text).encode(),
    "mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "mark-and-crlf": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("oddity", SAME)
def test_line_ends_and_marks_change_nothing(tmp_path, reader, oddity):
    assert read_back(tmp_path / "odd", reader, SAME[oddity]) == read_back(tmp_path / "plain", reader)


@pytest.mark.parametrize("reader", READERS)
def test_both_spellings_of_an_accent_are_one_text(tmp_path, reader):
    assert read_back(tmp_path / "odd", reader, form="NFD") == read_back(tmp_path / "plain", reader)


SEPARATORS = "\u2028\u2029\x85\v\f\x1c\x1d\x1e"


@pytest.mark.parametrize(
    ("reader", "separator"),
    # JSON has no raw control characters.
    [(reader, mark) for reader in READERS for mark in SEPARATORS if mark > " " or reader not in JSON],
    ids=lambda value: value if value in READERS else f"{ord(value):04x}",
)
def test_nothing_else_ends_a_line(tmp_path, reader, separator):
    found, without = (read_back(tmp_path / name, reader, put=put) for name, put in (("odd", separator), ("plain", " ")))
    if reader != "listops":  # whose symbols are numbers
        found = json.loads(json.dumps(found).replace(json.dumps(separator)[1:-1], " "))
    assert found == without


REFUSED = {
    "nul": lambda text: text.encode().replace(b"a", b"\0", 1),
    "latin-1": lambda text: text.encode().replace(b"a", b"\xe4", 1),
    "half-a-pair": lambda text: text.encode().replace(b"a", b"\xed\xa0\x80", 1),
    "utf-16": lambda text: text.encode("utf-16"),
    "cut": lambda text: text.encode() + b"\xc3",
}


@pytest.mark.parametrize("reader", [name for name in READERS if name != "listops"])
@pytest.mark.parametrize("oddity", REFUSED)
def test_what_is_no_text_is_refused_by_name(tmp_path, reader, oddity):
    with pytest.raises(DataError) as caught:
        read_back(tmp_path, reader, REFUSED[oddity])
    message = str(caught.value)
    assert any(name.rpartition("/")[2] in message for name in READERS[reader][0]) and "\n" not in message


def test_a_listops_table_with_a_nul_is_refused(tmp_path):
    for oddity in (b"7\t\0" + b"7\n", b"\xff\n"):
        (tmp_path / "basic_train.tsv").write_bytes(b"Source\tTarget\n" + oddity)
        with pytest.raises(DataError, match=r"basic_train\.tsv:2"):
            lra.read_listops(tmp_path, "train", 9)


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_strings_of_json_are_texts_too(tmp_path):
    """Their line ends are escaped; where characters are counted, they are counted as they stand in the file."""
    context = "\ufeffOne.\r\nCafe\u0301 Two.\rBram Oster met her."
    asked = {
        "id": 1,
        "question": "Who\r\n?",
        "answers": [{"text": "Bram Oster", "answer_start": context.index("Bram")}],
    }
    data = {"data": [{"title": "T", "paragraphs": [{"context": context, "qas": [asked]}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(data))
    (example,) = read_squad(tmp_path)
    assert example.context == "One.\nCafé Two.\nBram Oster met her." and example.question == "Who\n?"
    assert [example.context[a:b] for a, b in find_mentions(example)] == ["Bram Oster"]


@pytest.mark.parametrize(("text", "message"), [("a\n\0b", "NUL character in line 2"), ("\ud800", "not valid Unicode")])
def test_texts_that_are_none(text, message):
    with pytest.raises(DataError, match=f"^here.* {message}"):
        plain(text, "here")


def test_lines_are_numbered_as_they_stand(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n\r\n\xc3\xa9\rfour\n\n  ")
    assert list(lines(file)) == [(1, "one"), (2, ""), (3, "é"), (4, "four"), (5, "")]
    file.write_bytes(b"")
    assert list(lines(file)) == []
    file.write_bytes(b"1\n\n\r{}")
    assert list(json_lines(file)) == [(f"{file}:1", 1), (f"{file}:4", {})]


def test_a_file_keeps_what_is_its_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(" \ta \t\n\n\u2028\ufeffb\n\n", encoding="utf-8")
    assert read_text(file) == " \ta \t\n\n\u2028\ufeffb\n\n"
