"""Language modelling without a model: files, articles, windows, words, generated text."""

import gzip
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from astbench.backbones.tokenizers import train_byte_tokenizer, train_tokenizer
from astbench.errors import DataError, MissingPackageError
from astbench.tasks.lm import demo as lm_demo
from astbench.tasks.lm import sources as lm_sources
from astbench.tasks.lm.demo import KINDS
from astbench.tasks.lm.sources import Corpus, articles, join_rows, read_demo, read_hub, read_local
from astbench.tasks.lm.windows import Span, Windows, encode, pad, same_length, spread, tile

ARTICLES = [
    " = Du Fu = \n \n Du Fu was a poet . \n = = Life = = \n \n He wrote : \n = 1 henry and = \n a café \n \n",
    " = Kiss ( song ) = \n \n = = = Chart = = = \n \n Naïve € 5 \U0001d11e . \n \n",
    " = Ise = \n \n A ship . \n",
]
TEXT = " \n" + "".join(ARTICLES)


# -- articles -------------------------------------------------------------------------------------------------------


def test_articles_begin_at_titles_and_make_up_the_text():
    cuts = articles(TEXT)
    assert [TEXT[a:b] for a, b in cuts] == [" \n" + ARTICLES[0], *ARTICLES[1:]]


@pytest.mark.parametrize(
    "text",
    ["no title at all \n", " = Position ; GP = \n follows at once \n", "x \n = Late = \n \n", " = Only = \n \n", ""],
    ids=["none", "legend", "without-blank-before", "one", "empty"],
)
def test_text_without_a_second_title_is_one_article(text):
    assert articles(text) == [(0, len(text))]


def test_rows_of_the_hub_are_the_file():
    lines = TEXT.splitlines(keepends=True)
    assert join_rows([line if line.strip() else "" for line in lines]) == TEXT


def test_hub_problems_are_one_error(monkeypatch):
    import datasets

    def rows(name, configuration, *, split, revision):
        assert (name, revision) == lm_sources.HUB
        if split == "test":
            raise ConnectionError("no\nnetwork")
        return {"text": ["", f" = {configuration} = \n"]}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert read_hub("wikitext-2-v1", "train") == Corpus(" \n = wikitext-2-v1 = \n", "wikitext-2-v1/train")
    with pytest.raises(DataError, match=r"\(wikitext-2-v1, test\) cannot be had from the hub: no network; fetch it"):
        read_hub("wikitext-2-v1", "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=re.escape("astbench[hub]")):
        read_hub("wikitext-2-v1", "train")


@pytest.mark.parametrize("name", ["wiki.valid.raw", "wiki.valid.tokens", "wiki.valid.raw.gz", "wiki.valid.tokens.gz"])
def test_files_of_a_folder(tmp_path, name):
    data = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_local(str(tmp_path), "validation") == Corpus(TEXT, name)
    with pytest.raises(DataError, match=r"holds none of wiki\.train\.raw, wiki\.train\.tokens"):
        read_local(str(tmp_path), "train")
    assert read_local(str(tmp_path / name), "test").text == TEXT
    with pytest.raises(DataError, match=r"is one file; training needs a folder"):
        read_local(str(tmp_path / name), "train")


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("start", [0, 33])
def test_each_token_but_the_first_is_scored_exactly_once(start, length, stride):
    spans = tile(start, start + length, 16, stride)
    scored = [t for s in spans for t in range(s.stop - s.scored, s.stop)]
    if stride == 16:
        # Without overlap nothing comes before a window's first token.
        assert scored == [start + t for t in range(length) if t % 16]
    else:
        assert scored == list(range(start + 1, start + length))
    assert all(0 < s.scored < s.stop - s.start <= 16 for s in spans)


def test_windows_are_spread_over_the_text():
    assert spread(90, 10, 4) == [Span(s, s + 10, 9) for s in (0, 20, 40, 60)]
    assert spread(7, 10, 4) == [Span(s, 7, 6 - s) for s in (0, 1, 2, 3)]


def test_batches_hold_neighbours_of_one_length():
    spans = [Span(0, n, 1) for n in (7, 7, 7, 5, 7, 5, 5)]
    assert same_length(spans, 2) == [[0, 1], [2], [3], [4], [5, 6]]


# -- tokens, words and bytes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_tokenizer():
    return train_byte_tokenizer([TEXT], 290)


@pytest.fixture(scope="module", params=["bytes", "wordpiece"])
def tokenizer(request, byte_tokenizer):
    return byte_tokenizer if request.param == "bytes" else train_tokenizer([TEXT], 120)


@pytest.mark.parametrize("split", [False, True], ids=["packed", "separate"])
def test_every_word_line_and_byte_belongs_to_one_token(tokenizer, split):
    pieces = articles(TEXT) if split else [(0, len(TEXT))]
    encoded = encode(tokenizer, Corpus(TEXT, "x"), pieces, scoring=True)
    for (a, b), first, stop in zip(pieces, encoded.cuts, encoded.cuts[1:], strict=False):
        text = TEXT[a:b]
        # WikiText's own count: words by white space and <eos> for each line.
        assert int(encoded.words[first:stop].sum()) == len(text.split()) + text.count("\n")
        assert int(encoded.bytes[first:stop].sum()) == len(text.encode())


def test_words_and_bytes_of_single_tokens():
    letters = train_byte_tokenizer([], 257)  # no merges: a token a byte
    encoded = encode(letters, Corpus(" né \n", "x"), [(0, 5)], scoring=True)
    assert letters.convert_ids_to_tokens(encoded.ids.tolist()) == ["Ġ", "n", "Ã", "©", "Ġ", "Ċ"]
    # A character's bytes count with its first token, and so does the word that it ends.
    assert encoded.words.tolist() == [0, 0, 1, 0, 0, 1]
    assert encoded.bytes.tolist() == [1, 1, 2, 0, 1, 1]


def test_recalls_are_the_tokens_of_the_names():
    corpus = read_demo("test", 3)
    tokenizer = train_byte_tokenizer([corpus.text], 600)
    encoded = encode(tokenizer, corpus, articles(corpus.text), scoring=True)
    names = [corpus.text[a:b] for a, b in corpus.recalls]
    marked = encoded.recall.tolist()
    runs = [i for i, mark in enumerate(marked) if mark and not marked[i - 1]]
    assert len(runs) == len(names) == 3 * len(KINDS)
    for first, name in zip(runs, names, strict=True):
        stop = marked.index(False, first)
        assert tokenizer.decode(encoded.ids[first:stop]) == f" {name}"


def test_a_window_knows_what_it_scores(byte_tokenizer):
    encoded = encode(byte_tokenizer, Corpus(TEXT, "x"), [(0, len(TEXT))], scoring=True)
    row = Windows(encoded, [Span(3, 20, 7)])[0]
    assert row["input_ids"].tolist() == encoded.ids[3:20].tolist() and row["scored"] == 7
    assert row["words"] == int(encoded.words[13:20].sum()) and row["bytes"] == int(encoded.bytes[13:20].sum())


def test_training_batches_are_padded_where_lengths_differ(byte_tokenizer):
    rows = [{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 7], [8, 9])]
    batch = pad(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert pad(rows[:1]).keys() == {"input_ids"}


def test_the_byte_tokenizer_spells_anything(byte_tokenizer):
    text = "\U0001f984 ÿ\x00\t\n\n  <unk> Zürich"
    assert byte_tokenizer.decode(byte_tokenizer(text)["input_ids"]) == text
    assert len(byte_tokenizer) == 290
    assert byte_tokenizer.eos_token == byte_tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.slow
def test_the_byte_tokenizer_is_the_same_in_every_process():
    code = (
        "import hashlib, json; from astbench.tasks.lm.demo import generate; "
        "from astbench.backbones.tokenizers import train_byte_tokenizer as train; "
        "found = train([generate('train', 30).text], 700).backend_tokenizer.to_str(); "
        "print(hashlib.sha256(found.encode()).hexdigest())"
    )
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(3)}
    assert len(seen) == 1 and len(seen.pop().strip()) == 64


# -- the generated text ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return lm_demo.generate("train", 40)


def test_same_arguments_same_text_and_more_only_append(demo):
    assert lm_demo.generate("train", 40) == demo
    few = lm_demo.generate("train", 7)
    assert demo.text.startswith(few.text) and demo.recalls[: len(few.recalls)] == few.recalls
    assert lm_demo.generate("test", 40).text != demo.text != lm_demo.generate("train", 40, seed=1).text
    assert lm_demo.generate("train", 0) == lm_demo.DemoText("", ())
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        lm_demo.generate("train", -1)


def test_demo_articles_are_articles(demo):
    assert len(articles(demo.text)) == 40


def test_names_come_early_and_once_late(demo):
    """A window of 48 words sees none of them, nothing in between names them, and what comes before tells the kind."""
    for number, (a, b) in enumerate(articles(demo.text)):
        recalls = demo.recalls[number * len(KINDS) : (number + 1) * len(KINDS)]
        assert all(a <= first < stop <= b for first, stop in recalls)
        words = demo.text[a:b].split()
        seen = set()
        for first, stop in recalls:
            name, kind = demo.text[first:stop], next(k for k in KINDS if demo.text[a : first - 1].endswith(k))
            assert name in KINDS[kind]
            seen.add(kind)
            places = [i for i, word in enumerate(words) if word == name]
            assert len(places) == lm_demo.TOLD + 1 + (kind == "the town of")  # and in the title
            assert places[-1] - places[-2] > 48
        assert seen == KINDS.keys()


def test_no_name_is_of_two_kinds():
    names = [name for kind in KINDS.values() for name in kind]
    assert len(names) == len(set(names)) == 16 * len(KINDS)


def test_each_name_is_drawn_about_as_often(demo):
    """What is not read can only be guessed, one in sixteen."""
    drawn = Counter(demo.text[first:stop] for first, stop in demo.recalls)
    assert max(drawn.values()) < 0.25 * 40
