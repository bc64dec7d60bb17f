"""Tags of words on tokens: what needs no tagger, and, where spaCy is installed, real sentences."""

import json

import pytest

from astbench.analysis.linguistics import FAMILIES, PIPELINE, Tagger, _paragraphs, linguistic_classes
from astbench.errors import MissingPackageError
from tests.astbench.cli.commands import FIT


def named(found, family):
    return [None if place < 0 else FAMILIES[family][place] for place in found[family]]


def test_paragraphs_end_with_lines():
    first, last, line, within = range(4)
    assert _paragraphs(["mid", " text", ".", "\n", " New", " one", " ", "\n", "Only", "\n\n"]) == [
        within, within, last, line, first, last, within, line, first, line
    ]  # fmt: skip


def test_without_spacy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'astbench\[linguistics\]'"):
        Tagger()


@pytest.fixture(scope="module")
def tagger():
    spacy = pytest.importorskip("spacy", reason="pip install 'astbench[linguistics]'")
    if not spacy.util.is_package(PIPELINE):
        pytest.skip(f"{PIPELINE} is not installed: pip install 'astbench[linguistics]'")
    return Tagger()


def test_pieces_of_a_word_are_what_the_word_is(tagger):
    texts = ["Yes", " .", " Bar", "ack", " Ob", "ama", " was", " born", " in", " Hon", "ol", "ulu", " in", " 1961", "."]
    texts += ["\n", " He", " spoke", " ."]
    found = linguistic_classes(texts, [False] * len(texts), tagger)
    parts, entities, places = (named(found, family) for family in ("part of speech", "entity", "sentence"))
    assert parts[2:8] == ["proper noun"] * 4 + ["auxiliary", "verb"] and parts[14] == "punctuation"
    assert entities[2:6] == ["person"] * 4 and entities[9:12] == ["group or place"] * 3
    assert entities[13] == "date or time" and entities[16] == "no entity"
    assert places[0] is None and places[-1] is None, "the sequence may begin and end within a sentence"
    assert places[1] == "sentence's last" and places[2:4] == ["sentence's first"] * 2
    assert all(named(found, family)[15] is None for family in ("part of speech", "entity", "sentence"))
    assert named(found, "paragraph")[14:17] == ["paragraph's last", "line break", "paragraph's first"]


def test_special_tokens_are_of_no_class_and_end_a_paragraph(tagger):
    texts = ["[CLS]", " Who", " wrote", " it", " ?", "[SEP]", " Anna", " wrote", " it", " ."]
    found = linguistic_classes(texts, [text.startswith("[") for text in texts], tagger)
    for family in FAMILIES:
        assert named(found, family)[0] is None and named(found, family)[5] is None
    assert named(found, "paragraph")[1] == named(found, "paragraph")[6] == "paragraph's first"
    assert linguistic_classes([], [], tagger) == {family: [] for family in FAMILIES}


def test_another_pipeline_must_be_installed(tagger):
    with pytest.raises(MissingPackageError, match="--linguistics=xx_none: no such spaCy pipeline is installed"):
        Tagger("xx_none")


def test_a_run_is_analysed_with_its_drift(tagger, astbench, run, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    code, said = run([*FIT, "--keep_every=1", f"--run_dir={folder}"])
    assert code == 0, said
    done = astbench("analyze", f"--ckpt_path={folder}", "--rows=16", "--drift", "--linguistics", f"--run_dir={out}")
    assert done.code == 0, done.err
    found, record = (json.loads((out / name).read_text()) for name in ("linguistics.json", "record.json"))
    assert found["tagger"]["pipeline"] == record["analysis"]["tagger"]["pipeline"] == PIPELINE
    assert found["families"].keys() == {*FAMILIES, "rarity"}
    nouns = found["families"]["part of speech"]["noun"]
    assert nouns["tokens"] > 0 and nouns["kept"][0] > 0 and "«" in nouns["examples"][0]["text"]
    assert {"linguistics.png", "linguistics.svg", "drift.png", "drift.svg"} <= set(record["analysis"]["pictures"])
    assert record["analysis"]["drift"] == [0, 1, 2, 3]
