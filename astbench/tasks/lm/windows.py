"""Running text as windows of tokens: for training, and for evaluation with each token scored once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from astbench.tasks.lm.sources import Corpus
from astbench.training.sampler import Draw

_PIECES_AT_ONCE = 256  # articles handed to the tokenizer together: all of WikiText-103 would take tens of gigabytes
_UNIT = re.compile(r"\S+|\n")


class Span(NamedTuple):
    """A window: tokens `start` to `stop` of the text, of which the last `scored` are scored."""

    start: int
    stop: int
    scored: int


def tile(start: int, stop: int, context: int, stride: int) -> list[Span]:
    """Windows of `context` tokens, `stride` apart, over tokens `start` to `stop`; each token scored at most once.

    The first token of the first window has nothing before it and is never scored; without overlap (`stride` equal
    to `context`) no window's first token is.
    """
    spans, scored_to = [], start + 1
    for begin in range(start, stop - 1, stride):
        end = min(begin + context, stop)
        first = max(scored_to, begin + 1)
        if end > first:
            spans.append(Span(begin, end, end - first))
        scored_to = end
        if end == stop:
            break
    return spans


def spread(length: int, context: int, windows: int) -> list[Span]:
    """So many windows from `length` tokens, evenly apart, each scored from its second token on."""
    apart = max(1, (length - context) // windows)
    starts = [i * apart for i in range(windows) if i * apart < length - 1]
    return [Span(s, min(s + context, length), min(s + context, length) - s - 1) for s in starts]


@dataclass(frozen=True)
class Encoded:
    """A split in tokens.

    Attributes:
        ids: `(tokens,)`, int32.
        cuts: Where pieces begin, and the end: `len(pieces) + 1` numbers.
        words: `(tokens,)`: how many words of the text, its ends of lines included, end in each token.
        bytes: `(tokens,)`: of the text in UTF-8.
        recall: Bool `(tokens,)`: known from far before; see :class:`Corpus`.
    """

    ids: Tensor
    cuts: list[int]
    words: Tensor
    bytes: Tensor
    recall: Tensor


def encode(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, pieces: Sequence[tuple[int, int]], *, scoring: bool
) -> Encoded:
    """Tokenize a text piece by piece.

    Args:
        tokenizer: A fast one: offsets are needed.
        corpus: The text.
        pieces: Characters (first, after the last); together the whole text.
        scoring: Count words, bytes and recalls too; else these are zeros without memory.
    """
    ids: list[Tensor] = []
    words, sizes, ends = [], [], []
    for i in range(0, len(pieces), _PIECES_AT_ONCE):
        some = pieces[i : i + _PIECES_AT_ONCE]
        texts = [corpus.text[a:b] for a, b in some]
        coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=scoring, verbose=False)
        ids += [torch.tensor(row, dtype=torch.int32) for row in coded["input_ids"]]
        if not scoring:
            continue
        for text, (begin, _), offsets in zip(texts, some, coded["offset_mapping"], strict=True):
            end = torch.tensor([stop for _, stop in offsets], dtype=torch.long)
            end = end.cummax(0).values if len(end) else end  # the bytes of one character have one end
            words.append(_words(text, end))
            sizes.append(_bytes(text, end))
            ends.append(end + begin)
    cuts = [0, *torch.tensor([len(row) for row in ids]).cumsum(0).tolist()]
    if not scoring:
        none = torch.zeros(1, dtype=torch.long).expand(cuts[-1])
        return Encoded(torch.cat(ids), cuts, none, none, none.bool())
    return Encoded(torch.cat(ids), cuts, torch.cat(words), torch.cat(sizes), _recalls(corpus, torch.cat(ends)))


def _words(text: str, ends: Tensor) -> Tensor:
    """Words by white space, and one more a line, as WikiText counts `<eos>`; each belongs to the token it ends in."""
    if not len(ends):
        return ends
    stops = torch.tensor([unit.end() for unit in _UNIT.finditer(text)], dtype=torch.long)
    # What some tokenizers drop (white space) goes with the next token, at the end with the last.
    return torch.bincount(torch.searchsorted(ends, stops).clamp(max=len(ends) - 1), minlength=len(ends))


def _bytes(text: str, ends: Tensor) -> Tensor:
    if not len(ends):
        return ends
    before = torch.tensor([0, *(len(character.encode()) for character in text)]).cumsum(0)
    stops = before[ends]
    stops[-1] = before[-1]
    return stops.diff(prepend=torch.zeros(1, dtype=torch.long))


def _recalls(corpus: Corpus, ends: Tensor) -> Tensor:
    marked = torch.zeros(len(ends), dtype=torch.bool)
    for first, stop in corpus.recalls:
        a, b = torch.searchsorted(ends, torch.tensor([first + 1, stop])).tolist()
        marked[a : b + 1] = True
    return marked


class Windows(Dataset[dict[str, Any]]):
    """The windows of a split.

    Args:
        encoded: The text's tokens.
        spans: Where the windows are.
        start: Token in front of every window, which is never scored; None for none.
    """

    def __init__(self, encoded: Encoded, spans: Sequence[Span], start: int | None = None) -> None:
        self.encoded, self.spans = encoded, spans
        self.front = torch.tensor([] if start is None else [start], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, item: Draw | int) -> dict[str, Any]:
        index = item.example if isinstance(item, Draw) else item
        start, stop, scored = self.spans[index]
        part = slice(stop - scored, stop)
        return {
            "index": index,
            "input_ids": torch.cat([self.front, self.encoded.ids[start:stop].long()]),
            "scored": scored,
            "words": int(self.encoded.words[part].sum()),
            "bytes": int(self.encoded.bytes[part].sum()),
            "recall": self.encoded.recall[start + 1 : stop],
        }


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Training windows as one batch, with an `attention_mask` where their lengths differ."""
    lengths = [len(row["input_ids"]) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for row, length, into in zip(rows, lengths, ids, strict=True):
        into[:length] = row["input_ids"]
    if min(lengths) == max(lengths):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]}


def same_length(spans: Sequence[Span], size: int) -> list[list[int]]:
    """Batches of at most `size` neighbouring windows of one length."""
    batches: list[list[int]] = []
    for index, (start, stop, _) in enumerate(spans):
        before = spans[batches[-1][0]] if batches else None
        if before and len(batches[-1]) < size and before.stop - before.start == stop - start:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
