"""Windows with stride over documents: how a question and a long text become what a model reads."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from astbench.tasks.qa.examples import QAExample
from astbench.training.sampler import Draw
from astbench.training.seeds import derived_seed

CACHED_CHARACTERS = 20_000_000
"""Windows are kept for sets whose documents hold up to this much text (about 1 GB); others are cut when drawn."""


@dataclass(frozen=True)
class Window:
    """A question with one stretch of its document.

    Attributes:
        input_ids: The question, the stretch, and special tokens between and around them.
        token_type_ids: Which of the two each token belongs to.
        offsets: Character span in the document for each token of the stretch; None for others.
        starts: Tokens at which a right answer starts.
        ends: Tokens at which one ends, inclusive.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    offsets: list[tuple[int, int] | None]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class Windower:
    """Cuts (question, document) into windows of at most `max_length` tokens that overlap by `stride`.

    Args:
        tokenizer: A fast tokenizer with a template for pairs.
        max_length: Tokens of a window, question and special tokens included.
        stride: Tokens that neighbouring windows share.
        max_question: Longer questions are cut to this many tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, max_question: int) -> None:
        self.tokenizer, self.max_length, self.stride, self.max_question = (
            tokenizer,
            max_length,
            stride,
            max_question,
        )

    def windows(self, example: QAExample) -> list[Window]:
        """All windows of an example, in order; none for a document without a token."""
        encoded = self.tokenizer(
            self._short_question(example.question),
            example.context,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            # Not every tokenizer gives them by itself, and an encoder with token types is lost without.
            return_token_type_ids=True,
        )
        mentions = find_mentions(example)
        found = []
        for number, ids in enumerate(encoded["input_ids"]):
            parts = encoded.sequence_ids(number)
            offsets = [
                span if part == 1 else None for span, part in zip(encoded["offset_mapping"][number], parts, strict=True)
            ]
            if not any(offsets):
                continue
            types = encoded["token_type_ids"][number]
            starts, ends = _token_spans(mentions, offsets)
            found.append(Window(ids, types, offsets, starts, ends))
        return found

    def finds_text(self, example: QAExample) -> bool:
        """Whether the document holds a token; some hold only characters that the tokenizer drops."""
        return any(c.isalnum() for c in example.context) or bool(self.windows(example))

    def cuts_question(self, question: str) -> bool:
        """Whether the question is longer than `max_question` tokens."""
        return 4 * len(question) > self.max_question and self._short_question(question) != question

    def _short_question(self, question: str) -> str:
        encoded = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        return question if len(offsets) <= self.max_question else question[: offsets[self.max_question - 1][1]]


def find_mentions(example: QAExample) -> list[tuple[int, int]]:
    """Character spans of right answers in the document.

    Annotated starts are taken as they are. Otherwise every whole-word occurrence of any alias counts, as in
    TriviaQA's distant supervision, letter case aside.
    """
    if example.answer_starts is not None:
        spans = []
        for start in example.answer_starts:
            matching = [a for a in example.answers if example.context.startswith(a, start)]
            if matching:
                spans.append((start, start + len(max(matching, key=len))))
        return spans
    document = _folded(example.context)
    # Of thousands of aliases few stand in the document: tried at every character, they would take minutes.
    there = {alias for alias in (a.strip() for a in example.answers) if _folded(alias) in document}
    if not there:
        return []
    aliases = sorted(there, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, aliases)) + r")(?!\w)", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(example.context)]


_DOTTED_AND_DOTLESS = str.maketrans(
    {"\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}": "i", "\N{LATIN SMALL LETTER DOTLESS I}": "i"}
)


def _folded(text: str) -> str:
    """The same for any two letters that a regular expression takes for one, case aside; perhaps for others too."""
    return text.translate(_DOTTED_AND_DOTLESS).casefold()


def _token_spans(
    mentions: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int] | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last tokens of the mentions that lie wholly in the window."""
    inside = [(i, span) for i, span in enumerate(offsets) if span is not None]
    first, last = inside[0][1][0], inside[-1][1][1]
    starts, ends = set(), set()
    for begin, end in mentions:
        if begin < first or end > last:
            continue
        covered = [i for i, (a, b) in inside if a < end and b > begin]
        if covered:
            starts.add(covered[0])
            ends.add(covered[-1])
    return tuple(sorted(starts)), tuple(sorted(ends))


class QADataset(Dataset[dict[str, Any]]):
    """Training: one window per question and draw. Evaluation: every window of every question.

    Args:
        examples: The questions.
        windower: Cuts them.
        negative_share: Probability of drawing a window without an answer, where there are both kinds.
        seed: With the epoch and the index it decides which window is drawn.
        training: Draw, or list everything.
    """

    def __init__(
        self,
        examples: Sequence[QAExample],
        windower: Windower,
        *,
        negative_share: float,
        seed: int,
        training: bool,
    ) -> None:
        self.examples, self.windower = examples, windower
        self.negative_share, self.seed, self.training = negative_share, seed, training
        self._keeps = sum(len(e.context) for e in examples) <= CACHED_CHARACTERS
        self._cache: dict[int, list[Window]] = {}
        self._rows = [] if training else [(i, w) for i in range(len(examples)) for w in self.windows(i)]

    def windows(self, index: int) -> list[Window]:
        """The windows of one question."""
        if index in self._cache:
            return self._cache[index]
        windows = self.windower.windows(self.examples[index])
        if self._keeps:
            self._cache[index] = windows
        return windows

    def __len__(self) -> int:
        return len(self.examples) if self.training else len(self._rows)

    def __getitem__(self, item: Draw | int) -> dict[str, Any]:
        if not self.training:
            index, window = self._rows[item]  # type: ignore[index]
            return {"index": index, "window": window}
        epoch, index = item  # type: ignore[misc]
        windows = self.windows(index)
        rng = random.Random(derived_seed(self.seed, epoch, index))
        right = [w for w in windows if w.starts]
        wrong = [w for w in windows if not w.starts]
        pick_wrong = not right or (bool(wrong) and rng.random() < self.negative_share)
        return {"index": index, "window": rng.choice(wrong if pick_wrong else right)}


class Collate:
    """Windows to tensors, padded to the longest of the batch.

    A callable object, so that worker processes can be sent it.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Bool `starts` and `ends` mark right answers; a window without one marks its first token.

        `offsets` `(batch, length, 2)` are character spans in the document, -1 for tokens outside of it. (As lists
        they would cost a fifth of a step: Lightning walks through every batch for tensors to move.)
        """
        windows: list[Window] = [row["window"] for row in rows]
        length = max(len(w.input_ids) for w in windows)
        shape = (len(windows), length)
        input_ids = torch.full(shape, self.pad_token_id)
        masks = {n: torch.zeros(shape, dtype=torch.bool) for n in ("attention_mask", "starts", "ends")}
        offsets = torch.full((*shape, 2), -1)
        types = torch.zeros(shape, dtype=torch.long)
        for row, window in enumerate(windows):
            size = len(window.input_ids)
            input_ids[row, :size] = torch.tensor(window.input_ids)
            masks["attention_mask"][row, :size] = True
            offsets[row, :size] = torch.tensor([span or (-1, -1) for span in window.offsets])
            masks["starts"][row, list(window.starts) or [0]] = True  # the first token stands for "not here"
            masks["ends"][row, list(window.ends) or [0]] = True
            types[row, :size] = torch.tensor(window.token_type_ids)
        return {
            "input_ids": input_ids,
            "token_type_ids": types,
            **masks,
            "offsets": offsets,
            "answerable": offsets[..., 0] >= 0,
            "index": torch.tensor([row["index"] for row in rows]),
        }
