"""Learning a vocabulary: endless words take no endless time."""

import time

import pytest

from astbench.backbones.tokenizers import LONGEST_WORD, _short_words, train_bpe, train_byte_tokenizer, train_tokenizer

TEXT = "The town of Ashbridge has a mill . " * 20


@pytest.mark.parametrize("train", [train_byte_tokenizer, train_tokenizer, train_bpe])
@pytest.mark.parametrize("word", ["a" * 400_000, "abcdefghij" * 40_000], ids=["one-letter", "ten-letters"])
def test_a_word_of_400_000_letters_takes_seconds(train, word):
    began = time.monotonic()
    tokenizer = train([TEXT + word + " " + TEXT], 400)
    assert time.monotonic() - began < 20
    assert tokenizer.decode(tokenizer("mill")["input_ids"], skip_special_tokens=True).strip() == "mill"


def test_long_words_are_cut_and_nothing_is_lost():
    long = "x" * (2 * LONGEST_WORD + 7)
    texts = [TEXT, "", f"{TEXT} {long} {TEXT}", long[:LONGEST_WORD]]
    pieces = list(_short_words(texts))
    assert "".join(pieces) == "".join(texts) and len(pieces) == len(texts) + 2
    assert all(len(word) <= LONGEST_WORD for piece in pieces for word in piece.split())
