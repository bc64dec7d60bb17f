"""Tables of pairs that are not quite what is expected: blank cells, ids for sentences, languages swapped."""

import pytest

from astbench.errors import ConfigError, DataError
from astbench.tasks.mt.data import TranslationData
from astbench.tasks.mt.sources import Pair, read_table


def table(folder, text, name="deu.txt"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("\tHallo.", Pair("", "Hallo.")),
        ("Hello.\t", Pair("Hello.", "")),
        ("Hello.\t\tCC-BY", Pair("Hello.", "")),
        (" \tHallo.\t ", Pair("", "Hallo.")),
        (" Hello. \t Hallo. \t", Pair("Hello.", "Hallo.")),
        ("\t\tCC-BY", Pair("", "")),
    ],
)
def test_blank_cells_are_missing_sides_and_shift_nothing(tmp_path, line, pair):
    file = table(tmp_path, f"Go.\tGeh.\n\n \n{line}\n\t\nRun.\tLauf.\n")
    assert read_table(file) == [Pair("Go.", "Geh."), pair, Pair("Run.", "Lauf.")]


TATOEBA = "1\tHello.\t2\tHallo.\n7\tGo.\t8\tGeh.\n"


@pytest.mark.parametrize(
    ("text", "column", "advice"),
    [
        (TATOEBA, 1, "--data.columns=2,4"),
        ("1\tHello.\t2\tHallo.\n", 1, "--data.columns=2,4"),
        ("1\tHello.\tHallo.\n", 1, "--data.columns=2,3"),
        ("Hello.\t0.93\tHallo.\n", 2, "--data.columns=1,3"),
        ("1\t2\n3\t4\n", 1, "--data.columns=ENGLISH,GERMAN"),
        ("12\t\tHello.\tHallo.\n", 1, "--data.columns=3,4"),
    ],
)
def test_columns_of_ids_are_refused(tmp_path, text, column, advice):
    with pytest.raises(DataError) as caught:
        read_table(table(tmp_path, text))
    assert f"deu.txt: column {column} holds numbers" in str(caught.value) and advice in str(caught.value)


def test_a_few_numbers_among_sentences_are_sentences(tmp_path):
    text = "Go.\tGeh.\n1984\t1984\nRun.\tLauf.\n"
    assert len(read_table(table(tmp_path, text))) == 3


def test_columns_are_an_option(tmp_path):
    file = table(tmp_path, TATOEBA)
    data = TranslationData("local", str(file), columns="2,4", holdout=3)
    pairs = [pair for split in ("train", "validation", "test") for pair in data._read(split)]
    assert sorted(pairs) == [Pair("Go.", "Geh."), Pair("Hello.", "Hallo.")]
    with pytest.raises(DataError, match=r"deu\.txt:1 has 4 columns; --data\.columns=2,5 needs 5"):
        read_table(file, (2, 5))


@pytest.mark.parametrize("columns", ["", "1", "1,1", "0,1", "a,b", "1,2,3", "1;2", "-1,2"])
def test_bad_columns(columns):
    with pytest.raises(ConfigError, match=r"--data\.columns must be two"):
        TranslationData("local", columns=columns)


def test_columns_of_no_table(tmp_path):
    with pytest.raises(ConfigError, match=r"--data\.columns=2,4 is of a local table; --data\.source is demo"):
        TranslationData(columns="2,4")
    with pytest.raises(ConfigError, match="is a folder; name the table"):
        TranslationData("local", str(tmp_path), columns="2,4")._read("train")


SWAPPED = "Hallo Welt.\tHello world.\n\t\nTschüss.\tBye.\n"
LONGER = "Das ist ein Haus.\tThis is a house.\nWo ist der Hund?\tWhere is the dog?\n"


@pytest.mark.parametrize(
    ("text", "name", "refused"),
    [
        (SWAPPED, "news-commentary.de-en.tsv", True),
        (SWAPPED, "pairs.tsv", True),
        (LONGER, "pairs.tsv", True),
        ("Hallo Welt.\tHello world.\n", "x.de-en.tsv", True),
        ("Hello world.\tHallo Welt.\n", "deu-eng.txt", False),
        ("This is a house.\tDas ist ein Haus.\n", "x.de-en.tsv", False),
        ("My friend Müller left.\tMein Freund ist nicht mehr hier.\n", "pairs.tsv", False),
    ],
)
def test_languages_that_look_swapped_are_refused_unless_it_is_said(tmp_path, text, name, refused):
    file = table(tmp_path, text, name)
    if not refused:
        assert read_table(file)
        return
    with pytest.raises(DataError) as caught:
        TranslationData("local", str(file))._read("train")
    assert name in str(caught.value) and "--data.columns=2,1" in str(caught.value)
    for columns in ("1,2", "2,1"):
        pairs = read_table(file, TranslationData("local", columns=columns).columns)
        assert (pairs[0].en == text.split("\t")[0]) == (columns == "1,2")


def test_parallel_files_that_look_swapped_are_noted(tmp_path):
    german, english = zip(*(line.split("\t") for line in LONGER.splitlines()), strict=True)
    (tmp_path / "train.en").write_text("\n".join(german))
    (tmp_path / "train.de").write_text("\n".join(english))
    data = TranslationData("local", str(tmp_path))
    data._read("train")
    assert any("looks like German" in note for note in data.notes)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_evaluation_split_is_an_option(tmp_path, split):
    for name, word in (("train", "train"), ("val", "validation"), ("test", "test")):
        for language in ("en", "de"):
            (tmp_path / f"{name}.{language}").write_text(f"{word}\n")
    data = TranslationData("local", str(tmp_path), eval_split=split)
    data.setup("fit")
    assert data.sets.keys() == {"train", split} and data.pairs[split] == [Pair(split, split)]
