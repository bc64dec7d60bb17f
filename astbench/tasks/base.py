"""What every task's data module shares: whom it serves, its tokenizer, limits of options, the processes."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from os.path import exists, isdir  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from astbench.backbones.presets import BackboneConfig
from astbench.errors import ConfigError, DataError, SystemRefusal
from astbench.files.paths import asked_path, other_kind
from astbench.files.text import read_document

Found = TypeVar("Found")


class TaskData(pl.LightningDataModule):
    """Base of the data modules.

    Args:
        source: Where the examples come from; never swapped silently.
        path: For `local`: the folder or file.
    """

    length_option: ClassVar[str]  # the option that says how long inputs can be
    pads: ClassVar[bool]  # whether the inputs of a batch differ in length
    tokenized: ClassVar[bool] = True  # whether there is a tokenizer, which a run keeps
    takes_pretrained: ClassVar[bool] = True  # whether pretrained weights can be evaluated
    num_workers: int = 0
    eval_batch_size: int

    def __init__(self, source: str, path: str = "") -> None:
        super().__init__()
        self.source = source
        self.read_from(path)
        self.backbone = BackboneConfig()
        self.seed = 0
        self.tokenizer_folder: Path | None = None
        self.notes: list[str] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def longest(cls, data: Mapping[str, Any], backbone: Mapping[str, Any]) -> tuple[int | None, str]:
        """Tokens of the longest input that these options allow, None where only the model knows, and their flag."""
        return data[cls.length_option], f"--data.{cls.length_option}"

    def read_from(self, path: str) -> None:
        """Take the path, which only `local` reads.

        Raises:
            ConfigError: another source would leave it unread.
        """
        if path and self.source != "local":
            raise ConfigError(
                f"--data.path={path} is read with --data.source=local only; --data.source is {self.source}"
            )
        self.path = path

    def prepare(self, backbone: BackboneConfig, seed: int, tokenizer_folder: Path | None) -> None:
        """Tell the data module what it serves; called before the trainer starts.

        Args:
            backbone: Whose tokenizer to use.
            seed: Of the order, and of what a task draws or generates anew for every run.
            tokenizer_folder: Run folder whose saved tokenizer to use instead of making one.
        """
        self.backbone, self.seed, self.tokenizer_folder = backbone, seed, tokenizer_folder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run; there after `setup`."""
        assert self._tokenizer is not None, "setup() has not run"
        return self._tokenizer

    def padding_token(self) -> int:
        """Number of the token that fills up shorter inputs.

        Raises:
            ConfigError: the backbone's tokenizer has none.
        """
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise ConfigError(f"--backbone.name={self.backbone.name} has a tokenizer without a padding token")
        return int(pad)

    def loader(self, dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        """Batches, made by `num_workers` processes.

        Raises:
            SystemRefusal: so many need more open files than the system allows.
        """
        workers = self.num_workers
        if workers:
            _allow_files(workers)
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_group if workers else None,
            **arguments,
        )

    def share(self, dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        """This process's share of an evaluation set; one that is dealt twice to fill up is scored once."""
        trainer = self.trainer
        assert trainer is not None
        sampler: DistributedSampler[Any] | None = None
        if trainer.world_size > 1:
            sampler = DistributedSampler(dataset, trainer.world_size, trainer.global_rank, shuffle=False)
        return self.loader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **arguments)


FILES_PER_WORKER = 40
"""Open files that a process of the loader takes here: 8 of pipes and the process, two batches of up to 16 tensors."""


def _allow_files(workers: int) -> None:
    """Raise the limit of open files as far as the processes need it.

    One that meets the limit while it hands over a batch drops the batch without a word, and the run would wait for it
    for ever.

    Raises:
        SystemRefusal: the limit may not be raised so far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + workers * FILES_PER_WORKER
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemRefusal(
            f"--data.num_workers={workers} needs about {needed} open files, and {hard} are allowed; "
            "raise ulimit -n, or lower --data.num_workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _leave_group(worker: int) -> None:
    """A signal to the whole group is the run's, which stops its workers when its checkpoint is written."""
    os.setpgid(0, 0)


def at_least(least: int, unit: str = "", /, **values: int | None) -> None:
    """Refuse options of the data below `least`.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"--data.{name} must be at least {least}{unit and f' {unit}'}, got {value}")


def asked_text(option: str, file: str) -> str:
    """The text of a file that `predict` is asked about.

    Raises:
        DataError: missing, not UTF-8, empty, or too long; names the option.
    """
    path, place = asked_path(file), f"--data.{option}={file}"
    if not exists(path):
        raise DataError(f"{place} does not exist")
    if isdir(path):
        raise DataError(f"{place} is not a file{other_kind(path)}")
    text = read_document(path, place)
    if not text.strip():
        raise DataError(f"{place} is empty")
    return text


def of_all_processes(trainer: pl.Trainer, mine: Found) -> list[Found]:
    """What every process found, such as its results by the number of their example."""
    parts = [mine] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(parts, mine)
    return parts


def gathered(trainer: pl.Trainer, mine: dict[int, Any]) -> dict[int, Any]:
    """The results of all processes by the number of their example, in that order."""
    parts = of_all_processes(trainer, mine)
    return dict(sorted((index, value) for part in parts for index, value in part.items()))
