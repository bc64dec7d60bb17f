"""Sentence pairs for translation: the data module of `wmt14`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import exists, isdir, isfile  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.load import require_positions
from astbench.backbones.presets import resolve_preset
from astbench.backbones.tokenizers import load_tokenizer, saved_tokenizer, train_bpe
from astbench.errors import ConfigError, DataError
from astbench.files.paths import asked_path
from astbench.files.text import plain
from astbench.tasks.base import TaskData, at_least
from astbench.tasks.mt import demo, sources
from astbench.tasks.mt.batches import Collate, PairDataset, TokenRows, by_length
from astbench.tasks.mt.doubts import swapped
from astbench.tasks.mt.sources import Pair
from astbench.tasks.mt.unseen import Unseen
from astbench.training.sampler import StepBatchSampler

TABLES = (".tsv", ".tsv.gz", ".txt", ".txt.gz", ".zip")
"""How names of tables of pairs end."""


class TranslationData(TaskData):
    """English-German sentence pairs; `demo` is generated from a small grammar, `hub` and `local` are the real thing.

    Args:
        source: demo, hub (wmt/wmt14, de-en: tests are newstest2013 and newstest2014) or local.
        path: For `local`: a folder of parallel files, one sentence a line (`NAME.en` and `NAME.de`, or .eng and
            .deu, also .gz), or one table of pairs (English, tab, German; also .gz, or a .zip of just one).
        columns: For `local` with a table: which of its columns hold English and German, counted from 1, such as 2,4.
            If not given, they are the first two, and a table that does not look like it is refused.
        direction: en-de or de-en.
        train_name: For `local` with a folder: what the training files are called before their ending. Several,
            separated by commas, are read one after the other; one may be a table of pairs.
        unseen: For `local`: what no training pair may hold, without regard to case and punctuation.
            A sentence leaves out every pair that holds it on a side; `@FILE` every pair of which a side is a line
            of that file in the folder. Counted in the notes of the record.
        validation_name: For `local`: what the validation files are called; `../FOLDER/NAME` leads elsewhere.
        test_name: For `local`: what the test files are called.
        holdout: For `local` with one table: one English sentence in this many is held out for validation, and
            one for testing.
        demo_train: Generated training pairs, for `demo`.
        demo_eval: Generated evaluation pairs, for `demo`.
        max_length: Longest sentence in tokens, its end included. Longer pairs are not trained on, longer sources
            are cut, and no translation gets longer.
        batch_size: Sentence pairs per training step and process, of similar length.
        eval_batch_size: Sentences per evaluation step.
        max_train: Use at most this many training pairs, the first ones.
        max_eval: Use at most this many evaluation pairs, the first ones.
        eval_split: What `fit` and `validate` evaluate on.
        vocab_size: Of the tokenizer trained on both languages for a preset backbone.
        num_workers: Processes that prepare batches.
        text: For `predict`: a sentence to translate.
        file: For `predict`: a text file to translate line by line.
    """

    length_option: ClassVar[str] = "max_length"
    pads: ClassVar[bool] = True

    def __init__(
        self,
        source: Literal["demo", "hub", "local"] = "demo",
        path: str = "",
        columns: str | None = None,
        direction: Literal["en-de", "de-en"] = "en-de",
        train_name: str = "train",
        unseen: list[str] | None = None,
        validation_name: str = "val",
        test_name: str = "test",
        holdout: int = 50,
        demo_train: int = 20_000,
        demo_eval: int = 200,
        max_length: int = 128,
        batch_size: int = 64,
        eval_batch_size: int = 32,
        max_train: int | None = None,
        max_eval: int | None = None,
        eval_split: Literal["validation", "test"] = "validation",
        vocab_size: int = 8192,
        num_workers: int = 0,
        text: str = "",
        file: str = "",
    ) -> None:
        super().__init__(source, path)
        at_least(1, demo_train=demo_train, demo_eval=demo_eval, max_train=max_train, max_eval=max_eval)
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, num_workers=num_workers)
        at_least(2, max_length=max_length)
        at_least(3, holdout=holdout)
        at_least(300, vocab_size=vocab_size)  # 256 bytes, three special tokens, and something to merge
        self.columns = None if columns is None else _columns(columns)
        if columns is not None and source != "local":
            raise ConfigError(f"--data.columns={columns} is of a local table; --data.source is {source}")
        if unseen and source != "local":
            raise ConfigError(f"--data.unseen is of local files; --data.source is {source}")
        self.unseen = list(unseen or [])
        self.direction, self.eval_split = direction, eval_split
        self.names = {"train": train_name, "validation": validation_name, "test": test_name}
        self.holdout, self.demo_train, self.demo_eval = holdout, demo_train, demo_eval
        self.max_length, self.batch_size, self.eval_batch_size = max_length, batch_size, eval_batch_size
        self.max_train, self.max_eval = max_train, max_eval
        self.vocab_size, self.num_workers = vocab_size, num_workers
        self.text, self.file = text, file
        self.pairs: dict[str, list[Pair]] = {}
        self.totals: dict[str, int] = {}
        self.sets: dict[str, PairDataset] = {}
        self.fingerprints: dict[str, str] = {}
        self.sentences: list[str] = []
        self._table: dict[str, list[Pair]] | None = None

    # -- reading ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and tokenize the splits of a stage.

        Raises:
            DataError: nothing to read, or nothing in it that can be used.
        """
        evaluated: str = self.eval_split
        wanted = {"fit": ["train", evaluated], "validate": [evaluated], "test": ["test"], "predict": []}[stage]
        for split in wanted:
            if split not in self.pairs:
                self._read_split(split)
        if stage == "predict":
            self.sentences = self._asked()
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        for split in wanted:
            if split not in self.sets:
                self.sets[split] = self._training_set() if split == "train" else self._evaluation_set(split)
        if stage == "predict":
            self.sets["predict"] = self._predict_set()

    def _read_split(self, split: str) -> None:
        pairs = self._read(split)
        if split == "train" and self.unseen:
            pairs, notes = Unseen(self.unseen, _folder(self.path)).without(pairs)
            self.notes += notes
        self.totals[split] = len(pairs)
        pairs = pairs[: self.max_train if split == "train" else self.max_eval]
        if not any(pair.en and pair.de for pair in pairs):
            raise DataError(f"wmt14: the {split} split of source {self.source} holds no sentence pair")
        if split == "train":
            whole = [pair for pair in pairs if pair.en and pair.de]
            if len(whole) < len(pairs):
                self.notes.append(f"{len(pairs) - len(whole)} of {len(pairs)} training pairs lack a side: left out")
            pairs = whole
        self.pairs[split] = pairs
        self.fingerprints[split] = sources.fingerprint(pairs)

    def _read(self, split: str) -> list[Pair]:
        if self.source == "demo":
            count = self.demo_train if split == "train" else self.demo_eval
            return demo.generate(split, count, seed=self.seed if split == "train" else 0)
        if self.source == "hub":
            # Whole where it is scored: the signature says how many there are.
            return sources.read_hub(split, self.max_train if split == "train" else None)
        if not self.path:
            raise DataError("--data.source=local needs --data.path=FOLDER with train.en, train.de, ..., or a table")
        path = asked_path(self.path)
        if isdir(path):
            if self.columns is not None:
                raise ConfigError(f"--data.columns is of one table, and --data.path={path} is a folder; name the table")
            return [pair for name in self._names(split) for pair in self._read_name(path, name, f"{split}_name")]
        if not exists(path):
            raise DataError(f"--data.path={str(path)[:200]} does not exist")
        if self._table is None:
            self._table = {"train": [], "validation": [], "test": []}
            for pair in sources.read_table(path, self.columns):
                self._table[sources.split_of(pair, self.holdout)].append(pair)
        return self._table[split]

    def _names(self, split: str) -> list[str]:
        """What the files of a split are called: several for training."""
        return self.names[split].split(",") if split == "train" else [self.names[split]]

    def _read_name(self, folder: Path, name: str, option: str) -> list[Pair]:
        """Parallel files of a folder, or a table that the name leads to."""
        table = folder / name
        if option == "train_name" and name.endswith(TABLES) and isfile(table):
            return sources.read_table(table)
        pairs = sources.read_parallel(folder, name, option)
        if swapped(pairs):
            self.notes.append(f"the English side of {name} looks like German, the German like English")
        return pairs

    def _asked(self) -> list[str]:
        if bool(self.text.strip()) == bool(self.file):
            raise ConfigError("predict needs --data.text='...' or --data.file=FILE, one of them")
        return sources.read_sentences(self.file) if self.file else [plain(self.text, "--data.text").strip()]

    def sides(self, pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
        """Sources and targets in the direction of translation."""
        english, german = [pair.en for pair in pairs], [pair.de for pair in pairs]
        return (english, german) if self.direction == "en-de" else (german, english)

    def references(self, split: str) -> list[str]:
        """The right translations of an evaluation split."""
        return self.sides(self.pairs[split])[1]

    # -- tokens -----------------------------------------------------------------------------------------

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_folder is not None:
            return saved_tokenizer(self.tokenizer_folder)
        if resolve_preset(self.backbone.name, "seq2seq") is None:
            return load_tokenizer(self.backbone, offsets=False)
        if "train" not in self.pairs:
            self._read_split("train")
        return train_bpe((text for pair in self.pairs["train"] for text in pair), self.vocab_size)

    def _training_set(self) -> PairDataset:
        sources, targets = self.sides(self.pairs["train"])
        source, target = TokenRows(self._ids(sources)), TokenRows(self._ids(targets, target=True))
        kept = np.flatnonzero(np.maximum(source.lengths, target.lengths) <= self.max_length)
        if len(kept) < len(sources):
            self.notes.append(
                f"{len(sources) - len(kept)} of {len(sources)} training pairs are longer than {self.max_length} "
                "tokens: left out; --data.max_length allows more"
            )
        if not len(kept):
            raise DataError(f"wmt14: every training pair is longer than --data.max_length={self.max_length} tokens")
        return PairDataset(source, target, kept)

    def _evaluation_set(self, split: str) -> PairDataset:
        sources, targets = self.sides(self.pairs[split])
        source, target = TokenRows(self._cut(sources, split)), TokenRows(self._ids(targets, target=True, cut=True))
        return PairDataset(source, target)

    def _predict_set(self) -> PairDataset:
        self.fingerprints["predict"] = sources.fingerprint([Pair(s, "") for s in self.sentences])
        written = np.flatnonzero([bool(s) for s in self.sentences])  # an empty line has an empty translation
        return PairDataset(TokenRows(self._cut(self.sentences, "predict")), None, written)

    def _cut(self, sources: list[str], split: str) -> Iterator[list[int]]:
        long = 0
        for short, ids in zip(self._ids(sources, cut=True), self._ids(sources), strict=True):
            long += len(ids) > len(short)
            yield short
        if long:
            self.notes.append(
                f"{long} of {len(sources)} {split} sentences are cut to {self.max_length} tokens; "
                "--data.max_length allows more"
            )

    def _ids(self, texts: list[str], *, target: bool = False, cut: bool = False) -> Iterator[list[int]]:
        options: dict[str, Any] = {"truncation": True, "max_length": self.max_length} if cut else {"verbose": False}
        for start in range(0, len(texts), 10_000):
            chunk = texts[start : start + 10_000]
            encoded = self.tokenizer(text_target=chunk, **options) if target else self.tokenizer(chunk, **options)
            yield from encoded["input_ids"]

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse sentences longer than the model's positions.

        Raises:
            ConfigError: naming both numbers and the flags to change.
        """
        require_positions(model, self.max_length, f"--data.max_length={self.max_length}")

    # -- batches ----------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of (seed, epoch, step), of pairs of similar length."""
        dataset = self.sets["train"]
        assert self.trainer is not None
        sampler = StepBatchSampler(
            len(dataset), self.batch_size, self.seed, self.trainer, lengths=dataset.lengths.tolist()
        )
        return self.loader(dataset, batch_sampler=sampler, collate_fn=Collate(self.padding_token()))

    def val_dataloader(self) -> DataLoader[Any]:
        """Every sentence of the evaluation split."""
        return self._evaluation(self.eval_split)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test sentence."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every sentence that was asked about."""
        return self._evaluation("predict")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        """This process's share of the batches; one that is dealt twice to fill up changes no translation."""
        dataset, trainer, size = self.sets[split], self.trainer, self.eval_batch_size
        assert trainer is not None
        order = by_length(dataset.lengths)
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        share = -(-len(batches) // trainer.world_size)
        mine = [batches[(trainer.global_rank + i * trainer.world_size) % len(batches)] for i in range(share)]
        sampler = [index for batch in mine for index in batch]
        return self.loader(dataset, sampler=sampler, batch_size=size, collate_fn=Collate(self.padding_token()))

    # -- what the record says ---------------------------------------------------------------------------

    def test_set(self, split: str) -> str:
        """Which sentences were scored, and how many: test sets of one name come in several sizes."""
        total, used = self.totals[split], len(self.pairs[split])
        name = {"demo": f"demo {split}", "hub": sources.HUB_TESTS.get(split, split)}.get(self.source)
        if name is None:
            path = asked_path(self.path)
            name = Path(self.names[split]).name if isdir(path) else f"{path.name}, {split}"
        lines = f"{total:,} lines"
        if "newstest2014" in name:
            lines += {3003: ", the full set", 2737: ", the filtered set that sacreBLEU calls wmt14"}.get(total, "")
        if used < total:
            lines = f"the first {used:,} of {lines}"
        return f"{name} ({lines}), {self.direction}"

    def describe(self) -> dict[str, Any]:
        """What the record says of the data."""
        asked = bool(self.sentences)
        return {
            "source": ("file" if self.file else "text") if asked else self.source,
            "path": (self.file if asked else self.path) or None,
            "direction": self.direction,
            "pairs": {split: len(pairs) for split, pairs in self.pairs.items()},
            "vocabulary": len(self.tokenizer),
            "fingerprints": dict(self.fingerprints),
            "notes": list(self.notes),
        }


def _folder(path: str) -> Path:
    """Where the files of a local source lie."""
    found = asked_path(path)
    return found if isdir(found) else found.parent


def _columns(given: str) -> tuple[int, int]:
    """Two different numbers from 1.

    Raises:
        ConfigError: something else.
    """
    numbers = [int(part) for part in given.split(",") if part.strip().isdecimal()]
    if len(numbers) != 2 or given.count(",") != 1 or min(numbers) < 1 or numbers[0] == numbers[1]:
        raise ConfigError(f"--data.columns must be two column numbers from 1, such as 2,4, got {given}")
    return numbers[0], numbers[1]
