"""Files that would take all memory or all time, and names that the system refuses: one line, exit 3, soon."""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
import zipfile

import pytest

from astbench.errors import DataError
from astbench.files import reading
from astbench.files.text import LONGEST, lines, read_document, read_text
from astbench.tasks.lra import sources as lra
from astbench.tasks.mt.sources import read_table
from astbench.tasks.qa.sources import read_triviaqa
from tests.astbench.cli.test_cli import assert_refused
from tests.astbench.files.test_text import READERS, read_back
from tests.astbench.tasks.qa.reading import read_squad

BLANKS = 16 << 20
"""More than a packed file may unpack to without asking."""


def bomb(file, letter=b" "):
    """A file of 16 kB that unpacks to 16 MB."""
    with gzip.open(file, "wb", compresslevel=9) as out:
        for _ in range(BLANKS >> 20):
            out.write(letter * (1 << 20))
    return file


@pytest.mark.parametrize("letter", [b" ", b"\n"], ids=["one-line", "many-lines"])
def test_a_packed_file_that_unpacks_to_far_more_than_text_does(tmp_path, monkeypatch, letter):
    monkeypatch.setattr(reading, "SMALL_BYTES", 1 << 20)
    file = bomb(tmp_path / "x.gz", letter)
    with pytest.raises(DataError, match=r"x\.gz unpacks to more than 100 times its size, .* unpack it yourself"):
        read_text(file)
    with pytest.raises(DataError, match=r"x\.gz(:1 is longer than| unpacks to more than)"):
        list(lines(file))


def test_a_zip_that_unpacks_to_far_more_than_text_does(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SMALL_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("deu.txt", "w") as out:
        for _ in range(BLANKS >> 20):
            out.write(b"\n" * (1 << 20))
    with pytest.raises(DataError, match=r"x\.zip unpacks to more than 100 times its size"):
        read_table(tmp_path / "x.zip")


def test_text_that_repeats_itself_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SMALL_BYTES", 0)
    text = "".join(f"The town of Ashbridge has {n} mills .\n" for n in range(20_000))
    (tmp_path / "x.gz").write_bytes(gzip.compress(text.encode()))
    assert read_text(tmp_path / "x.gz") == text


def test_a_file_that_is_read_whole_has_a_limit(tmp_path):
    (tmp_path / "x.txt").write_text("a" * 11)
    with pytest.raises(DataError, match=r"x\.txt holds more than 10 bytes"):
        read_text(tmp_path / "x.txt", most=10)
    assert read_text(tmp_path / "x.txt", most=11) == "a" * 11


@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("squad", "triviaqa")])
def test_one_endless_line_is_refused_by_every_reader(tmp_path, reader):
    began = time.monotonic()
    with pytest.raises(DataError, match=r"longer than|more than 8,388,608") as caught:
        read_back(tmp_path, reader, lambda text: (text.rstrip("\n") + "x " * (LONGEST // 2 + 1)).encode())
    assert any(name.rpartition("/")[2] in str(caught.value) for name in READERS[reader][0])
    assert time.monotonic() - began < 20


def test_the_longest_line_is_still_read(tmp_path):
    (tmp_path / "x.txt").write_text("b\n" + "a" * LONGEST + "\nc")
    assert [len(line) for _, line in lines(tmp_path / "x.txt")] == [1, LONGEST, 1]
    assert len(read_text(tmp_path / "x.txt")) == LONGEST + 4
    (tmp_path / "x.txt").write_text("b\n" + "a" * (LONGEST + 1) + "\nc")
    for read in (lambda f: list(lines(f)), read_text):
        with pytest.raises(DataError, match=r"x\.txt:2 is longer than 8,388,608 characters"):
            read(tmp_path / "x.txt")


def test_documents_put_together_have_a_limit_too(tmp_path):
    """Each page may be shorter than the limit."""
    pages = tmp_path / "evidence/wikipedia"
    pages.mkdir(parents=True)
    (pages / "A.txt").write_text("a b\n" * (LONGEST // 8))
    page = {"Filename": "A.txt", "Title": "t"}
    item = {"QuestionId": "q", "Question": "who?", "Answer": {"Value": "Bob", "Aliases": []}, "EntityPages": [page] * 3}
    (tmp_path / "wikipedia-train.json").write_text(json.dumps({"Data": [item]}))
    with pytest.raises(DataError, match="question 1: its document is longer than"):
        read_triviaqa(tmp_path, "train")


def test_a_context_of_squad_has_a_limit(tmp_path):
    paragraphs = [{"context": "a " * (LONGEST // 2 + 1), "qas": []}]
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    with pytest.raises(DataError, match=r"dev\.json: article 1, paragraph 1: column 'context' is longer than"):
        read_squad(tmp_path)


IMPOSSIBLE = {"nul": "a\0.txt", "long": "a" * 5000, "name": "b" * 300, "surrogate": "\ud800", "loop": "loop", "dir": ""}


@pytest.mark.parametrize("name", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_evidence_of_an_impossible_name(tmp_path, name):
    evidence = tmp_path / "evidence/wikipedia"
    evidence.mkdir(parents=True)
    os.symlink("loop", evidence / "loop")
    page = {"Filename": name, "Title": "t"}
    item = {"QuestionId": "q", "Question": "who?", "Answer": {"Value": "Bob", "Aliases": []}, "EntityPages": [page]}
    (tmp_path / "wikipedia-train.json").write_text(json.dumps({"Data": [item]}))
    with pytest.raises(DataError, match=r"question 1: evidence '.*' does not exist") as caught:
        read_triviaqa(tmp_path, "train")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["b" * 300, "c" * 5000, "loop"], ids=["name", "long", "loop"])
def test_images_of_an_impossible_name(tmp_path, name):
    folder = tmp_path / "curv_baseline"
    (folder / "metadata").mkdir(parents=True)
    os.symlink("loop", folder / "loop")
    (folder / "metadata/0.npy").write_text(f"{name} a.png 0 1\n")
    with pytest.raises(DataError, match=r"0\.npy:1: image '.*' does not exist"):
        lra.read_pathfinder(tmp_path, 6)


@pytest.mark.parametrize("path", ["d" * 300, "e" * 5000, "loop", "~nobody-of-this-name/x"])
@pytest.mark.parametrize("task", ["triviaqa", "squad", "wikitext103", "wmt14", "lra_text"])
def test_a_path_of_an_impossible_name(astbench, tmp_path, monkeypatch, task, path):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    words = ["fit", f"--task={task}", "--attention=dense", "--data.source=local", f"--data.path={path}"]
    done = astbench(*words, "--run_dir=run")
    assert_refused(done, 3, "--data.path=")
    assert len(done.err) < 1000


def test_an_image_is_measured_before_it_is_unpacked(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "train/deer/1.png"
    file.parent.mkdir(parents=True)
    image.new("L", (4000, 4000)).save(file)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(DataError, match="4000 x 4000 pixels, expected 32 x 32"):
        lra._grey_image(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.jsonl.gz", "wiki.train.raw.gz", "deu.tsv.gz"])
def test_a_gigabyte_of_blanks_ends_before_memory_does(tmp_path, name):
    with gzip.open(tmp_path / name, "wb") as out:
        for _ in range(1 << 10):
            out.write(b" " * (1 << 20))
    (tmp_path / "validation.jsonl").write_text("")
    task = {"train": "triviaqa", "wiki": "wikitext103", "deu": "wmt14"}[name.partition(".")[0]]
    path = tmp_path / name if task == "wmt14" else tmp_path
    words = ["fit", "--attention=dense", f"--task={task}", "--data.source=local", f"--data.path={path}"]
    done = subprocess.run(
        [sys.executable, "-m", "astbench", *words, f"--run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 3 and "unexpected" not in done.stderr and name in done.stderr


def test_a_document_has_the_limit_of_a_line(tmp_path):
    (tmp_path / "x.txt").write_text("a b\n" * (LONGEST // 4 + 1))
    with pytest.raises(DataError, match=r"here holds more than 8,388,608 bytes, which is the limit here"):
        read_document(tmp_path / "x.txt", "here")
