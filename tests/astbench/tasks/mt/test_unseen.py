"""Training from several files, and the sentences that it must not see."""

import pytest

from astbench.errors import ConfigError, DataError
from astbench.tasks.mt.data import TranslationData
from astbench.tasks.mt.sources import Pair


@pytest.fixture
def folder(tmp_path):
    files = {
        "a/train.en": "A dog runs.\nThe fox, as one says, jumps.\nGo.\n",
        "a/train.de": "Ein Hund läuft.\nDer Fuchs springt, sagt man.\nGeh.\n",
        "b/deu.txt": "Hi.\tHallo.\nI saw it: the fox as one says.\tIch sah ihn.\n"
        "Skulk\tEin HUND läuft!\nHi.\tGrüß Gott.\n",
        "a/test.en": "Hi!\nSomething else.\n",
        "a/test.de": "Hallo!\nEtwas anderes.\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "a"


def read(folder, **options):
    data = TranslationData("local", str(folder), **options)
    data._read_split("train")
    return data.pairs["train"], data.notes


def test_training_reads_several_names_in_their_order(folder):
    pairs, notes = read(folder, train_name="train,../b/deu.txt")
    assert len(pairs) == 7 and pairs[2:4] == [Pair("Go.", "Geh."), Pair("Hi.", "Hallo.")] and notes == []


def test_a_missing_one_of_several_is_named(folder):
    with pytest.raises(DataError, match=r"holds no \.\./b/none\.txt\.en"):
        read(folder, train_name="train,../b/none.txt")


def test_sentences_leave_out_what_holds_them_and_files_what_equals_a_line(folder):
    pairs, notes = read(
        folder, train_name="train,../b/deu.txt", unseen=["ein Hund läuft", "The fox as one says", "@test.en"]
    )
    assert pairs == [Pair("Go.", "Geh.")]
    assert notes == [
        '2 of 7 training pairs hold a sentence of --data.unseen ("ein hund läuft"): left out',
        '2 of 7 training pairs hold a sentence of --data.unseen ("the fox as one says"): left out',
        "2 of 7 training pairs hold a sentence of --data.unseen (test.en): left out",
    ]


def test_words_are_whole_and_a_line_must_be_the_whole_side(folder):
    pairs, notes = read(folder, unseen=["un", "A dog", "@test.de"])
    assert len(pairs) == 2 and [note.split()[0] for note in notes] == ["0", "1", "0"]


def test_evaluation_is_left_alone(folder):
    data = TranslationData("local", str(folder), unseen=["Hi", "@test.en"])
    data._read_split("test")
    assert len(data.pairs["test"]) == 2


def test_of_a_table_training_alone_is_filtered(folder):
    data = TranslationData(
        "local", str(folder.parent / "b" / "deu.txt"), holdout=1000, unseen=["Hallo", "@../a/test.de"]
    )
    data._read_split("train")
    assert [pair.de for pair in data.pairs["train"]] == ["Ich sah ihn.", "Ein HUND läuft!", "Grüß Gott."]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("@none.en", r"--data\.unseen names @none\.en, and .*none\.en is not a file"),
        (" ...", "an entry without a word"),
    ],
)
def test_bad_entries(folder, entry, message):
    with pytest.raises(ConfigError, match=message):
        read(folder, unseen=[entry])


def test_only_local_data_have_it():
    with pytest.raises(ConfigError, match=r"--data\.unseen is of local files; --data\.source is demo"):
        TranslationData(unseen=["a"])
