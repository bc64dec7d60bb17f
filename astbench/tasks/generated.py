"""What the data modules share whose examples are token ids from the start: generated probes, bytes, pixels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.load import require_positions
from astbench.backbones.presets import Head, resolve_preset
from astbench.backbones.tokenizers import saved_tokenizer
from astbench.errors import ConfigError, DataError
from astbench.tasks.base import TaskData, at_least
from astbench.training.sampler import Draw, StepBatchSampler
from astbench.training.seeds import derived_seed

SPLITS = ("train", "validation", "test")
"""Their numbers go into the seeds of generated examples: no two splits are drawn alike."""

FINGERPRINTED = 16
"""Generated examples of a split whose content its fingerprint covers: they are made only when asked for."""


class ProbeData(TaskData):
    """Base of the probes' data modules.

    Args:
        source: Where the examples come from; never swapped silently.
        batch_size: Examples per training step and process.
        eval_batch_size: Examples per evaluation step.
        max_train: Use at most this many training examples.
        max_eval: Use at most this many evaluation examples.
        eval_split: What `fit` and `validate` evaluate on.
        num_workers: Processes that prepare batches.
    """

    task: ClassVar[str]
    head: ClassVar[Head]
    pads: ClassVar[bool] = False
    takes_pretrained: ClassVar[bool] = False
    length: int  # tokens of the longest input

    def __init__(
        self,
        source: str,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        max_train: int | None = None,
        max_eval: int | None = None,
        eval_split: Literal["validation", "test"] = "validation",
        num_workers: int = 0,
    ) -> None:
        super().__init__(source)
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, max_train=max_train, max_eval=max_eval)
        at_least(0, num_workers=num_workers)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_train, self.max_eval, self.eval_split = max_train, max_eval, eval_split
        self.num_workers = num_workers
        self.sets: dict[str, ProbeSet] = {}

    @property
    def from_scratch(self) -> bool:
        """Whether the backbone is a preset."""
        return resolve_preset(self.backbone.name, self.head) is not None

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        """The task's vocabulary.

        Raises:
            ConfigError: a pretrained backbone.
        """
        if not self.from_scratch:
            raise ConfigError(
                f"task {self.task} trains from scratch, its ids mean nothing to pretrained weights: --backbone takes a "
                f"preset (tiny, small), got {self.backbone.name}"
            )
        return self.vocabulary()

    def vocabulary(self) -> PreTrainedTokenizerBase:
        """The vocabulary of a backbone from scratch."""
        raise NotImplementedError

    def read(self, split: str) -> Sequence[dict[str, Any]]:
        """The examples of a split (train, validation or test) as dictionaries of tensors and numbers."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read or generate the splits of a stage.

        Raises:
            ConfigError: a pretrained backbone.
            DataError: nothing to read, or nothing in it that can be used.
        """
        if self.tokenized and self._tokenizer is None:
            if self.tokenizer_folder is not None:
                self._tokenizer = saved_tokenizer(self.tokenizer_folder)
            else:
                self._tokenizer = self.make_tokenizer()
        wanted: dict[str, list[str]] = {
            "fit": ["train", self.eval_split],
            "validate": [self.eval_split],
            "test": ["test"],
        }
        for split in wanted[stage]:
            if split not in self.sets:
                limit = self.max_train if split == "train" else self.max_eval
                rows = self.read(split)
                if not len(rows):
                    raise DataError(f"{self.task}: the {split} split of source {self.source} is empty")
                self.sets[split] = self.examples(split, rows, len(rows) if limit is None else min(limit, len(rows)))

    def examples(self, split: str, rows: Sequence[dict[str, Any]], count: int) -> ProbeSet:
        """The first `count` rows of a split, as the model takes them."""
        return ProbeSet(rows, count)

    def generated(
        self, split: str, num_train: int, num_eval: int, data_seed: int, make: Callable[[int, int], Any], **keep: bool
    ) -> Generated:
        """A split of generated rows."""
        size = num_train if split == "train" else num_eval
        return Generated(size, derived_seed(data_seed, SPLITS.index(split)), make, **keep)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse inputs longer than the model's positions."""
        require_positions(model, self.length, f"--data.{self.length_option}={self.length}")

    def lengths(self, split: str) -> list[int] | None:
        """Tokens of each example, where similar ones should share a batch."""
        return None

    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """What makes a batch of examples: here they are all of one length."""
        return default_collate

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of (seed, epoch, step)."""
        assert self.trainer is not None
        dataset = self.sets["train"]
        sampler = StepBatchSampler(
            len(dataset), self.batch_size, self.seed, self.trainer, lengths=self.lengths("train")
        )
        return self.loader(dataset, batch_sampler=sampler, collate_fn=self.collate())

    def val_dataloader(self) -> DataLoader[Any]:
        """The evaluation examples in their order."""
        return self._evaluation(self.eval_split)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test examples in their order."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        """Examples; one that two processes get is scored once, by its number."""
        return self.share(self.sets[split], collate_fn=self.collate())

    def describe(self) -> dict[str, Any]:
        """What the record says of the data."""
        return {
            "source": self.source,
            "path": self.path or None,
            "examples": {split: len(s) for split, s in self.sets.items()},
            "length": self.length,
            "fingerprints": {
                split: s.fingerprint(FINGERPRINTED if self.source in ("generated", "demo") else len(s))
                for split, s in self.sets.items()
            },
            "notes": list(self.notes),
        }


class ProbeSet(Dataset[dict[str, Any]]):
    """Rows with their numbers, of which the first `count` are used."""

    def __init__(self, rows: Sequence[dict[str, Any]], count: int) -> None:
        self.rows, self.size = rows, count

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        index = key.example if isinstance(key, Draw) else key
        return {"index": index, **self.rows[index]}

    def fingerprint(self, covered: int) -> str:
        """Short digest of the first `covered` examples, in order."""
        digest = hashlib.sha256()
        for index in range(min(self.size, covered)):
            for name, value in sorted(self.rows[index].items()):
                for part in value if isinstance(value, list) else [value]:
                    digest.update(f"{name} ".encode() + torch.as_tensor(part).numpy().tobytes())
        return digest.hexdigest()[:16]


class Generated(Sequence[Any]):
    """Row number i is a function of (seed, i) alone, made when it is asked for.

    Args:
        size: Rows.
        seed: Other seeds, other rows.
        make: Makes a row from its number and its own seed.
        keep: Keep what was made: for rows that take longer to make than to train on.
    """

    def __init__(self, size: int, seed: int, make: Callable[[int, int], Any], *, keep: bool = False) -> None:
        self.size, self.seed, self.make, self.keep = size, seed, make, keep
        self.kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if index in self.kept:
            return self.kept[index]
        row = self.make(index, derived_seed(self.seed, index))
        if self.keep:
            self.kept[index] = row
        return row


def share_of(right: Sequence[bool]) -> float:
    """Percent of true values."""
    return 100 * sum(right) / len(right)


def by_group(pairs: Sequence[tuple[str, bool]]) -> dict[str, dict[str, float]]:
    """Percent right, and how many, of each group, in the order in which the groups first come."""
    count, right = Counter(group for group, _ in pairs), Counter(group for group, ok in pairs if ok)
    return {group: {"accuracy": 100 * right[group] / n, "count": n} for group, n in count.items()}
