"""Needles in a haystack: generated text for a backbone from scratch, or for a pretrained one's own tokenizer."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from astbench.backbones.tokenizers import load_tokenizer, tokens_around, word_tokenizer
from astbench.errors import ConfigError
from astbench.tasks.base import at_least
from astbench.tasks.generated import Generated
from astbench.tasks.recall import needle_text
from astbench.tasks.recall.data import IGNORED, RecallData
from astbench.training.seeds import derived_seed


class NeedleData(RecallData):
    """Sentences that give a secret for each of several keys, hidden in a long text, and questions at its end.

    See :func:`astbench.tasks.recall.needle_text.generate` for the text and its source. A preset is trained on it with a
    token a word; a pretrained backbone can be tested with its own tokenizer.

    Args:
        source: generated is all there is.
        length: Tokens of an input; each has exactly as many.
        num_keys: Needles in a text.
        num_questions: Keys that are asked for at its end, one after the other, each answer following its question.
        num_depths: Depths of the needles asked for: this many, evenly spaced from the text's start to its end.
        values: Secrets are words, or numbers of seven digits.
        num_train: Training texts.
        num_eval: Texts of the validation and of the test split.
        data_seed: Of the texts. The run's seed only orders them.
    """

    task = "needle"
    takes_pretrained: ClassVar[bool] = True
    grouped_by: ClassVar[str] = "depth"

    def __init__(
        self,
        source: Literal["generated"] = "generated",
        length: int = 128,
        num_keys: int = 4,
        num_questions: int = 1,
        num_depths: int = 11,
        values: Literal["words", "numbers"] = "words",
        num_train: int = 100_000,
        num_eval: int = 550,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        at_least(1, num_questions=num_questions, num_train=num_train, num_eval=num_eval)
        at_least(2, num_depths=num_depths)
        at_least(0, data_seed=data_seed)
        if not num_questions <= num_keys <= len(needle_text.KEYS):
            raise ConfigError(
                f"--data.num_keys must be between num_questions={num_questions} and {len(needle_text.KEYS)}, got "
                f"{num_keys}"
            )
        self.length, self.num_keys, self.num_questions = length, num_keys, num_questions
        self.num_depths, self.values = num_depths, values
        self.num_train, self.num_eval, self.data_seed = num_train, num_eval, data_seed
        self.signature = (
            f"needle accuracy (%, greedy decoding), {num_keys} keys with {values} in {length} tokens, "
            f"{num_questions} asked for"
        )

    def setup(self, stage: str) -> None:
        """See the base class; a pretrained backbone is only tested."""
        if stage == "fit" and not self.from_scratch:
            raise ConfigError(
                f"task needle trains from scratch: --backbone takes a preset (tiny, small), got {self.backbone.name}; "
                "`astbench test` takes pretrained ones"
            )
        super().setup(stage)

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        """A token a word, or the pretrained backbone's own."""
        return self.vocabulary() if self.from_scratch else load_tokenizer(self.backbone)

    def vocabulary(self) -> PreTrainedTokenizerBase:
        """Every word and mark that the texts are made of."""
        return word_tokenizer(needle_text.words())

    def read(self, split: str) -> Generated:
        """The texts of a split.

        Raises:
            ConfigError: needles and questions alone are longer than `length`.
        """
        # What the tokenizer puts before every text: a beginning-of-sequence token, or nothing. Not what it puts after.
        self._prefix = [] if self.from_scratch else tokens_around(self.tokenizer, "a")[0]
        shortest = self._count(self._text(0, 0, length=1).text) + len(self._prefix)
        if self.length < shortest:
            raise ConfigError(f"--data.length must be at least {shortest} tokens for these needles, got {self.length}")
        return self.generated(split, self.num_train, self.num_eval, self.data_seed, self._make)

    def groups(self, split: str, index: int) -> list[str]:
        """Percent of the haystack before the needle of each question."""
        rows = self.sets[split].rows
        assert isinstance(rows, Generated)
        return [str(depth) for depth in self._text(index, derived_seed(rows.seed, index)).depths]

    def _text(self, index: int, seed: int, length: int | None = None) -> needle_text.NeedleText:
        grid, asked = self.num_depths, self.num_questions
        # The grid is gone through example by example, so that all depths are asked for as often.
        depths = [round(100 * ((index * asked + n) % grid) / (grid - 1)) for n in range(asked)]
        return needle_text.generate(
            random.Random(seed),
            depths,
            length=length or self.length - len(self._prefix),
            num_keys=self.num_keys,
            values=self.values,
            count=self._count,
        )

    def _make(self, index: int, seed: int) -> dict[str, Tensor]:
        made = self._text(index, seed)
        coded = self.tokenizer(made.text, add_special_tokens=False, return_offsets_mapping=True)
        # What is too long is cut from the filler sentence in front.
        kept = self.length - len(self._prefix)
        ids = torch.tensor([*self._prefix, *coded["input_ids"][-kept:]])
        offsets = [(0, 0)] * len(self._prefix) + coded["offset_mapping"][-kept:]
        labels, question = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        for number, (begin, end) in enumerate(made.answers):
            for at, (first, last) in enumerate(offsets):
                if first < end and last > begin:
                    labels[at - 1], question[at - 1] = ids[at], number
        return {"input_ids": ids, "labels": labels, "question": question}

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
