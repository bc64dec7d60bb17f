"""Token ids of sentence pairs, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from astbench.training.sampler import Draw

IGNORED = -100
"""Label of padding: no loss there."""


class TokenRows:
    """Token ids of many sentences in one array: lists of Python numbers would take ten times the memory."""

    def __init__(self, rows: Iterator[list[int]]) -> None:
        chunks, lengths = [], []
        for ids in rows:
            chunks.append(np.asarray(ids, dtype=np.int32))
            lengths.append(len(ids))
        self.ids = np.concatenate(chunks) if chunks else np.empty(0, np.int32)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._ends = self.lengths.cumsum()

    def __getitem__(self, index: int) -> Tensor:
        end = self._ends[index]
        return torch.from_numpy(self.ids[end - self.lengths[index] : end].astype(np.int64))


class PairDataset(Dataset[dict[str, Any]]):
    """Tokenized pairs.

    Args:
        source: Of every sentence.
        target: Of every sentence; None where there is none to know.
        kept: Rows of both that are used; all by default.
    """

    def __init__(self, source: TokenRows, target: TokenRows | None, kept: np.ndarray | None = None) -> None:
        self.source, self.target = source, target
        self.kept = np.arange(len(source.lengths)) if kept is None else kept
        longest = source.lengths if target is None else np.maximum(source.lengths, target.lengths)
        self.lengths = longest[self.kept]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        row = int(self.kept[draw.example if isinstance(draw, Draw) else draw])
        item = {"index": row, "source": self.source[row]}
        return item if self.target is None else {**item, "target": self.target[row]}


class Collate:
    """Rows padded to the longest of the batch: `input_ids`, `attention_mask`, `labels` and `index`."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch; without targets it has no labels."""
        lengths = torch.tensor([len(item["source"]) for item in items])
        ids = self._padded([item["source"] for item in items], self.pad)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None],
            "index": torch.tensor([item["index"] for item in items]),
        }
        if "target" in items[0]:
            batch["labels"] = self._padded([item["target"] for item in items], IGNORED)
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def by_length(lengths: np.ndarray) -> list[int]:
    """Sentences by length, from the middle on: the first batch's attention is looked at, and should be ordinary."""
    order: list[int] = np.argsort(lengths, kind="stable").tolist()
    middle = len(order) // 2
    return order[middle:] + order[:middle]
