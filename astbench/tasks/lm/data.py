"""Running text as windows of tokens: the data module of `wikitext103`."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.load import require_positions
from astbench.backbones.presets import resolve_preset
from astbench.backbones.tokenizers import (
    BYTES,
    load_tokenizer,
    saved_tokenizer,
    start_token,
    tokens_around,
    train_byte_tokenizer,
)
from astbench.errors import ConfigError, DataError
from astbench.files.text import plain
from astbench.tasks.base import TaskData, asked_text, at_least
from astbench.tasks.lm.sources import Corpus, WikiText, articles, read_demo, read_hub, read_local
from astbench.tasks.lm.windows import Span, Windows, encode, pad, same_length, spread, tile
from astbench.training.sampler import StepBatchSampler


class WikiTextData(TaskData):
    """WikiText in windows of tokens.

    Args:
        source: demo (generated), hub (Salesforce/wikitext) or local.
        path: For `local`: folder with `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw` (or `.tokens`, also
            `.gz`), or one file to evaluate on.
        dataset: For `hub`: which WikiText.
        context: Tokens of a window, among them the token that the tokenizer itself begins every text with, if it does.
        stride: For evaluation: tokens from one window's start to the next; of each window only its last `stride`
            tokens are scored (of the first all), so each token is scored at most once. Default: all of a window's.
        windows: For evaluation: only this many windows, spread evenly over the text (packed: each from its own
            start, `stride` aside).
        documents: "packed": windows run on from one article into the next, as is usual; "separate": none reaches
            across two articles, and those at an article's end are shorter.
        batch_size: Windows per training step and process.
        eval_batch_size: Windows per evaluation step.
        max_train: Use at most this many training windows.
        eval_split: What `fit` and `validate` evaluate on.
        vocab_size: Of the byte-level tokenizer that is trained on the training text for a preset backbone.
        demo_train: For `demo`: generated training articles.
        demo_eval: For `demo`: generated evaluation articles.
        prompt: For `predict`: the text to continue.
        prompt_file: For `predict`: a file with the text to continue, in place of `prompt`.
    """

    length_option: ClassVar[str] = "context"
    pads: ClassVar[bool] = False  # but see `LanguageModel.needs`

    def __init__(
        self,
        source: Literal["demo", "hub", "local"] = "demo",
        path: str = "",
        dataset: WikiText = "wikitext-103-raw-v1",
        context: int = 1024,
        stride: int | None = None,
        windows: int | None = None,
        documents: Literal["packed", "separate"] = "packed",
        batch_size: int = 8,
        eval_batch_size: int = 1,
        max_train: int | None = None,
        eval_split: Literal["validation", "test"] = "validation",
        vocab_size: int = 8192,
        demo_train: int = 4000,
        demo_eval: int = 50,
        prompt: str = "",
        prompt_file: str = "",
    ) -> None:
        super().__init__(source, path)
        at_least(2, "tokens", context=context)
        if stride is not None and not 1 <= stride <= context:
            raise ConfigError(f"--data.stride must be between 1 and context={context}, got {stride}")
        at_least(1, windows=windows, max_train=max_train, demo_train=demo_train, demo_eval=demo_eval)
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(BYTES + 1, vocab_size=vocab_size)
        if prompt and prompt_file:
            raise ConfigError("--data.prompt and --data.prompt_file are two prompts; give one")
        self.dataset = dataset
        self.context, self.stride, self.windows, self.documents = context, stride or context, windows, documents
        self.batch_size, self.eval_batch_size, self.max_train = batch_size, eval_batch_size, max_train
        self.eval_split = eval_split
        self.vocab_size, self.demo_train, self.demo_eval = vocab_size, demo_train, demo_eval
        self.prompt, self.prompt_file = prompt, prompt_file
        self._corpora: dict[str, Corpus] = {}
        self.sets: dict[str, Windows] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.prompt_ids: Tensor | None = None
        self.prompt_added: list[str] = []
        self.start: int | None = None

    @property
    def room(self) -> int:
        """Tokens of the text in a window."""
        return self.context - (self.start is not None)

    @property
    def step(self) -> int:
        """Tokens from one evaluation window's start to the next."""
        return min(self.stride, self.room)

    @property
    def begins(self) -> str:
        """The token that every window begins with, as it is written; empty for none."""
        return "" if self.start is None else str(self.tokenizer.convert_ids_to_tokens(self.start))

    def setup(self, stage: str) -> None:
        """Read and cut the splits of a stage.

        Raises:
            DataError: missing, unreadable or empty text.
        """
        evaluated: str = self.eval_split
        wanted = {"fit": ["train", evaluated], "validate": [evaluated], "test": ["test"], "predict": []}
        missing = [split for split in wanted[stage] if split not in self.sets]
        self._corpora = {split: self._read(split) for split in missing}
        prompt = self._prompt() if stage == "predict" else ""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        self.start = start_token(self.tokenizer)
        if stage == "predict":
            if not self.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
                raise DataError("the prompt holds no token; give some text with --data.prompt='...'")
            # As transformers does: with the special tokens that the tokenizer puts around every text.
            self.prompt_ids = torch.tensor(self.tokenizer(prompt)["input_ids"])
            before, after = tokens_around(self.tokenizer, prompt)
            self.prompt_added = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in (*before, *after)]
        for split in missing:
            self._cut(split, self._corpora.pop(split))

    def _read(self, split: str) -> Corpus:
        if self.source == "hub":
            corpus = read_hub(self.dataset, split)
        elif self.source == "local":
            corpus = read_local(self.path, split)
        else:
            corpus = read_demo(split, self.demo_train if split == "train" else self.demo_eval)
        if not corpus.text.strip():
            raise DataError(f"{corpus.name} of source {self.source} holds no text")
        return corpus

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_folder is not None:
            return saved_tokenizer(self.tokenizer_folder)
        if resolve_preset(self.backbone.name, "causal_lm") is None:
            return load_tokenizer(self.backbone)
        corpus = self._corpora["train"]  # a preset without a folder is one that is being trained
        return train_byte_tokenizer((corpus.text[a:b] for a, b in articles(corpus.text)), self.vocab_size)

    def _cut(self, split: str, corpus: Corpus) -> None:
        if self.room < 2:
            raise ConfigError(f"--data.context must be at least 3 tokens, as each window begins with {self.begins}")
        training = split == "train"
        found = articles(corpus.text)
        # Evaluated packed, the text is tokenized in one piece, as others do who compare perplexities. Not for
        # training, where it may be of half a gigabyte.
        pieces = found if training or self.documents == "separate" else [(0, len(corpus.text))]
        encoded = encode(self.tokenizer, corpus, pieces, scoring=not training)
        ends = encoded.cuts if self.documents == "separate" else [0, len(encoded.ids)]
        stride = self.room if training else self.step
        spans = [s for a, b in pairwise(ends) for s in tile(a, b, self.room, stride)]
        if training:
            spans = self._training_spans(spans)
        elif self.windows is not None and self.documents == "packed":
            spans = spread(len(encoded.ids), self.room, self.windows)
        elif self.windows is not None:
            spans = [spans[i * len(spans) // self.windows] for i in range(min(self.windows, len(spans)))]
        if not spans:
            raise DataError(f"{corpus.name} of source {self.source} holds no text of two tokens")
        self.sets[split] = Windows(encoded, spans, self.start)
        self.about[split] = {
            "file": corpus.name,
            "tokens": len(encoded.ids),
            "articles": len(found),
            "windows": len(spans),
            "fingerprint": hashlib.sha256(corpus.text.encode()).hexdigest()[:16],
        }
        if not training:
            self.about[split]["scored"] = sum(s.scored for s in spans)

    def _training_spans(self, spans: list[Span]) -> list[Span]:
        """Packed windows are all of one length, where there is one that long."""
        whole = [s for s in spans if s.stop - s.start == self.room]
        return (whole if whole and self.documents == "packed" else spans)[: self.max_train]

    def _prompt(self) -> str:
        if not self.prompt_file:
            if not self.prompt:
                raise ConfigError("predict needs --data.prompt='...' or --data.prompt_file=FILE")
            return plain(self.prompt, "--data.prompt")
        return asked_text("prompt_file", self.prompt_file)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse windows longer than the model's positions.

        Raises:
            ConfigError: naming both numbers and the flags to change.
        """
        if self.prompt_ids is None:  # else no window is read
            require_positions(model, self.context, f"--data.context={self.context}")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of (seed, epoch, step)."""
        windows = self.sets["train"]
        assert self.trainer is not None
        lengths = [s.stop - s.start for s in windows.spans] if self.documents == "separate" else None
        sampler = StepBatchSampler(len(windows), self.batch_size, self.seed, self.trainer, lengths=lengths)
        return DataLoader(windows, batch_sampler=sampler, collate_fn=pad)

    def val_dataloader(self) -> DataLoader[Any]:
        """The windows of the evaluation text."""
        return self._evaluation(self.eval_split)

    def test_dataloader(self) -> DataLoader[Any]:
        """The windows of the test text."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        """Windows in text order, this process's share of the batches; a batch holds windows of one length."""
        windows, trainer = self.sets[split], self.trainer
        assert trainer is not None
        batches = same_length(windows.spans, self.eval_batch_size)
        return DataLoader(windows, batch_sampler=batches[trainer.global_rank :: trainer.world_size])

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompt."""
        assert self.prompt_ids is not None
        return DataLoader([{"input_ids": self.prompt_ids}], batch_size=1)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """What the record says of the data."""
        if self.prompt_ids is not None:
            return {"source": "prompt", "path": self.prompt_file or None, "tokens": len(self.prompt_ids), "notes": []}
        evaluated = {split: about for split, about in self.about.items() if split != "train"}
        return {
            "source": self.source,
            "path": self.path,
            "context": self.context,
            "stride": self.step,
            "documents": self.documents,
            "split_tokens": {split: about["tokens"] for split, about in self.about.items()},
            "train": self.about.get("train"),
            "notes": list(self.notes),
            **next(iter(evaluated.values())),
        }


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What perplexities per token can be compared by."""
    return f"{type(tokenizer).__name__} of {len(tokenizer)} tokens"
