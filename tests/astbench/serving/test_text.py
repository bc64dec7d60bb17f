"""Text of tokens as they come."""

import pytest

from astbench.backbones.tokenizers import train_byte_tokenizer
from astbench.serving.text import TextStream

TOKENIZER = train_byte_tokenizer(["the river of a town", "é 漢字 🙂"], 270)


def streamed(tokens, stop=()):
    stream, parts = TextStream(TOKENIZER, stop), []
    for token in tokens:
        parts.append(stream.add(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()], stream


@pytest.mark.parametrize("text", ["the river", "é 漢字 🙂 é", "a\n\n b  ", "🙂🙂🙂"])
def test_the_parts_are_the_whole(text):
    tokens = TOKENIZER(text)["input_ids"]
    parts, _ = streamed(tokens)
    assert "".join(parts) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)


def test_half_a_character_comes_at_the_end():
    tokens = TOKENIZER("a 漢")["input_ids"][:-1]
    parts, _ = streamed(tokens)
    assert "".join(parts) == TOKENIZER.decode(tokens) and parts[-1].endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["ver"], "the ri"),
        (["of", "ri"], "the "),
        (["the"], ""),
        (["x"], "the river of a"),
        (["of a town"], "the river of a"),
    ],
)
def test_stop_strings_are_no_part_of_it(stop, wanted):
    parts, stream = streamed(TOKENIZER("the river of a")["input_ids"], stop)
    assert "".join(parts) == wanted
    assert stream.stopped == (wanted != "the river of a")


def test_what_may_be_a_stop_string_is_held_back():
    tokens = TOKENIZER("the ri", add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER, ["river"])
    assert "".join(stream.add(token) for token in tokens) == "the "
    assert stream.finish() == "ri"
