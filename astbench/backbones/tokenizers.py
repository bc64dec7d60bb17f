"""A backbone's own tokenizer, or one trained on the task's text for a preset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from astbench.backbones.load import locate
from astbench.backbones.presets import BackboneConfig
from astbench.errors import DataError, MissingPackageError
from astbench.files.reading import read_by_library

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SEQ2SEQ_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}

BYTES = 256
"""Tokens that a byte-level vocabulary begins with, beside the one for the end of a text."""

LONGEST_WORD = 1000
"""Most letters of a word that a vocabulary is learned from: the time that takes grows with their square."""

_END_OF_TEXT = "<|endoftext|>"


def train_byte_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in GPT-2's form: it spells any text; the same texts give the same vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_short_words(texts), trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece in BERT's form, trained on `texts`; the same texts give the same vocabulary."""
    texts = list(_short_words(dict.fromkeys(texts)))  # several questions share a document
    trained = _bert_form(models.WordPiece(unk_token="[UNK]"))
    # Left to itself, the trainer numbers the word-inner letters in the random order of a hash table, and breaks
    # ties between merges by these numbers: another vocabulary in every process. So it is given them in order.
    inner = sorted({f"##{letter}" for word in _words(trained, texts) for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL.values(), *inner], show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    ids = trained.get_vocab()
    # A tokenizer of its own, in which they are no special tokens.
    tokenizer = _bert_form(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut where a word is longer than LONGEST_WORD."""
    for text in texts:
        begin = 0
        if max(map(len, text.split()), default=0) > LONGEST_WORD:
            for found in re.finditer(rf"\S{{{LONGEST_WORD}}}", text):
                yield text[begin : found.end()]
                begin = found.end()
        yield text[begin:]


def _bert_form(model: models.WordPiece) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _words(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> set[str]:
    split, normalize = tokenizer.pre_tokenizer.pre_tokenize_str, tokenizer.normalizer.normalize_str
    # Both work character by character and end words at spaces: each piece between need be seen once.
    pieces = {piece for text in texts for piece in text.split(" ")}
    return {word for piece in pieces for word, _ in split(normalize(piece))}


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Cased byte-level BPE that ends every text with `</s>`: nothing is unknown, and decoding gives the text back.

    Text that spells a special token is text. The same texts give the same vocabulary: bytes are numbered in
    order, and ties between merges are broken by these numbers.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    # A space in front: a word is the same tokens at the start of a sentence as inside.
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SEQ2SEQ_SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_short_words(texts), trainer)
    end = SEQ2SEQ_SPECIAL["eos_token"]
    trained.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, trained.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **SEQ2SEQ_SPECIAL,
    )


def id_tokenizer(size: int, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A vocabulary for data that are ids already: the numerals from 0, after special tokens such as `[PAD]`.

    Args:
        size: Ids without the special ones.
        special: Tokens that come first, out of `SPECIAL`.
    """
    vocabulary = {token: number for number, token in enumerate([*special, *map(str, range(size))])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {name: token for name, token in SPECIAL.items() if token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token for each of some words, marks and digits, numbered in order: for generated text."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def load_tokenizer(backbone: BackboneConfig, *, offsets: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with pretrained weights.

    Args:
        backbone: Whose.
        offsets: Offsets into the text are needed, which only fast tokenizers give.

    Raises:
        DataError: none there, or not a fast one where offsets are needed.
        MissingPackageError: it needs a package that is not installed.
    """
    where, arguments = locate(backbone)
    try:
        with read_by_library(f"--backbone.name={backbone.name} has no readable tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, **arguments
            )
    except ImportError as error:  # Marian's need sentencepiece
        raise MissingPackageError(
            f"the tokenizer of --backbone.name={backbone.name} needs a package: {' '.join(str(error).split())[:200]}"
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers makes an empty one up where the files are missing.
        raise DataError(f"--backbone.name={backbone.name} comes without a tokenizer's files")
    if offsets and not tokenizer.is_fast:
        raise DataError(f"--backbone.name={backbone.name} has only a slow tokenizer; a fast one is needed")
    return tokenizer


def saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run folder.

    Raises:
        DataError: missing or damaged.
    """
    if not (Path(folder) / "tokenizer").is_dir():
        raise DataError(f"{folder} holds no tokenizer; it is not a whole run folder")  # and not a name on the hub
    with read_by_library(f"{folder}/tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(Path(folder) / "tokenizer"), trust_remote_code=False
        )
    return tokenizer


def tokens_around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before a text, and those after it."""
    whole: list[int] = tokenizer(text)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    more = len(whole) - len(plain)
    before = next((n for n in range(more + 1) if whole[n : n + len(plain)] == plain), more)
    return whole[:before], whole[before + len(plain) :]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, where the tokenizer itself puts it in front of every text."""
    before, _ = tokens_around(tokenizer, "a")
    return before[0] if before[:1] == [tokenizer.bos_token_id] else None
