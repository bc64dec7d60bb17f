"""A backbone's own tokenizer, or one trained on the task's text for a preset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from astbench.backbones.load import locate
from astbench.backbones.presets import BackboneConfig
from astbench.errors import DataError

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece in BERT's form, trained on `texts`; the same texts give the same vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def load_tokenizer(backbone: BackboneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with pretrained weights.

    Raises:
        DataError: none there, or not a fast one (offsets into the text are needed).
    """
    where, arguments = locate(backbone)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"--backbone.name={backbone.name} has no readable tokenizer: {' '.join(str(error).split())[:200]}"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"--backbone.name={backbone.name} has only a slow tokenizer; a fast one is needed")
    return tokenizer


def saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run folder.

    Raises:
        DataError: missing or damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(Path(folder) / "tokenizer"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}/tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from error
    return tokenizer
