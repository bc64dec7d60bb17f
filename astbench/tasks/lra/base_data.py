"""What the data modules of sequence classification share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerBase

from astbench.backbones.presets import Head
from astbench.backbones.tokenizers import id_tokenizer
from astbench.tasks.base import at_least
from astbench.tasks.generated import ProbeData

SPECIAL = ("[PAD]", "[CLS]")
FIRST = len(SPECIAL)
"""The id that an example's value 0 has."""


Row = tuple[tuple[bytes, ...], int]
"""One input, or the two of a pair, as bytes, and the class."""


class SequenceClassificationData(ProbeData):
    """Inputs are bytes: characters, grey levels or numbers of symbols.

    Args:
        path: For `local`: the folder with the data set's own files.
        max_length: Tokens of an input; longer ones are cut.
        group_by_length: Put examples of similar length into one batch, where lengths differ and are known.
    """

    head: ClassVar[Head] = "sequence_classification"
    length_option: ClassVar[str] = "max_length"
    paired: ClassVar[bool] = False
    num_classes: ClassVar[int]
    num_ids: ClassVar[int] = 256  # bytes, or grey levels
    what: ClassVar[str]  # the signature's beginning

    def __init__(
        self, source: str, path: str = "", max_length: int = 1024, group_by_length: bool = True, **options: Any
    ) -> None:
        super().__init__(source, **options)
        at_least(1, "token", max_length=max_length)
        self.read_from(path)
        self.length, self.group_by_length = max_length, group_by_length
        self.signature = f"{self.what} accuracy (%), at most {max_length} tokens"

    def vocabulary(self) -> PreTrainedTokenizerBase:
        """Padding, a token to classify by, then the values."""
        return id_tokenizer(self.num_ids, SPECIAL)

    def read(self, split: str) -> ByteRows:
        """See the base class."""
        return ByteRows(self.rows(split), self.pads)

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of a split."""
        raise NotImplementedError

    def lengths(self, split: str) -> list[int] | None:
        """Of the longer one of a pair; None where the order is to be by chance alone."""
        if not (self.pads and self.group_by_length) or self.source == "generated":
            return None  # rows that are made when asked for would all have to be made first
        dataset = self.sets[split]
        assert isinstance(dataset.rows, ByteRows)
        return [max(map(len, dataset.rows.rows[i][0])) for i in range(len(dataset))]

    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Padding, where inputs differ in length."""
        return Padded() if self.pads else default_collate


class ByteRows(Sequence[dict[str, Any]]):
    """Rows as examples: `input_ids`, a list where they will be padded and else one tensor, and `label`."""

    def __init__(self, rows: Sequence[Row], padded: bool) -> None:
        self.rows, self.padded = rows, padded

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        inputs, label = self.rows[index]
        ids = [torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + FIRST for text in inputs]
        return {"input_ids": ids if self.padded else ids[0], "label": label}


@dataclass(frozen=True)
class Padded:
    """Makes a batch of examples whose `input_ids` are a list: of one sequence, or of the two of a pair.

    Pairs lie below one another: all first sequences, then all second ones, `(2 * batch, length)`.
    """

    pad: int = SPECIAL.index("[PAD]")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, padded on the right, `label` and `index`."""
        sequences = [ids for part in zip(*(row["input_ids"] for row in rows), strict=True) for ids in part]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self.pad)
        sizes = torch.tensor([len(sequence) for sequence in sequences])
        return {
            "input_ids": ids,
            "attention_mask": torch.arange(ids.shape[1]) < sizes[:, None],
            "label": torch.tensor([row["label"] for row in rows]),
            "index": torch.tensor([row["index"] for row in rows]),
        }
