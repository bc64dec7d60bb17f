"""Question answering over documents: the data modules of `triviaqa` and `squad`."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.load import require_positions
from astbench.backbones.presets import resolve_preset
from astbench.backbones.tokenizers import load_tokenizer, saved_tokenizer, train_tokenizer
from astbench.errors import ConfigError, DataError
from astbench.files.text import plain
from astbench.tasks.base import TaskData, asked_text, at_least
from astbench.tasks.qa import demo, sources, squad
from astbench.tasks.qa.examples import QAExample
from astbench.tasks.qa.windows import Collate, QADataset, Windower, find_mentions
from astbench.training.sampler import StepBatchSampler
from astbench.training.seeds import derived_seed


class SpanQAData(TaskData):
    """Base of the question-answering data modules.

    Args:
        source: Where the questions come from; never swapped silently.
        path: For `local`: the folder or file.
        max_length: Tokens of a window, question included.
        stride: Tokens that neighbouring windows of a document share.
        max_question: Longer questions are cut to this many tokens.
        batch_size: Windows per training step and process.
        eval_batch_size: Windows per evaluation step.
        negative_share: Probability of training on a window without an answer, where a document has both kinds.
        group_by_length: Put questions about documents of similar length into one batch.
        max_train: Use at most this many training questions.
        max_eval: Use at most this many evaluation questions.
        eval_split: What `fit` and `validate` evaluate on.
        vocab_size: Of the tokenizer trained for a preset backbone.
        num_workers: Processes that prepare batches.
        question: For `predict`: the question.
        document: For `predict`: a text file to answer it from.
    """

    task: ClassVar[str]
    length_option: ClassVar[str] = "max_length"
    pads: ClassVar[bool] = True

    def __init__(
        self,
        source: str,
        path: str = "",
        max_length: int = 512,
        stride: int = 128,
        max_question: int = 64,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        negative_share: float = 0.2,
        group_by_length: bool = True,
        max_train: int | None = None,
        max_eval: int | None = None,
        eval_split: Literal["validation", "test"] = "validation",
        vocab_size: int = 8192,
        num_workers: int = 0,
        question: str = "",
        document: str = "",
    ) -> None:
        super().__init__(source, path)
        at_least(1, max_length=max_length, max_question=max_question, max_train=max_train, max_eval=max_eval)
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, vocab_size=vocab_size)
        at_least(0, stride=stride, num_workers=num_workers)
        if not 0 <= negative_share <= 1:
            raise ConfigError(f"--data.negative_share must be between 0 and 1, got {negative_share}")
        if stride >= max_length - max_question - 3:
            raise ConfigError(
                f"--data.stride={stride} must be below max_length - max_question - 3 = {max_length - max_question - 3}"
            )
        self.max_length, self.stride, self.max_question = max_length, stride, max_question
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.group_by_length = group_by_length
        self.negative_share, self.max_train, self.max_eval = negative_share, max_train, max_eval
        self.eval_split, self.vocab_size, self.num_workers = eval_split, vocab_size, num_workers
        self.question, self.document = question, document
        self.examples: dict[str, list[QAExample]] = {}
        self.sets: dict[str, QADataset] = {}
        self.fingerprints: dict[str, str] = {}

    def read(self, split: str) -> list[QAExample]:
        """The questions of a split: train, validation or test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read the splits of a stage and tokenize the evaluation set.

        Raises:
            DataError: nothing to read, or nothing in it that can be used.
        """
        wanted: dict[str, list[str]] = {
            "fit": ["train", self.eval_split],
            "validate": [self.eval_split],
            "test": ["test"],
            "predict": [],
        }
        split: str
        for split in wanted[stage]:
            if split not in self.examples:
                self._read_split(split)
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        if stage == "predict":
            self.examples["predict"] = [self._asked()]
            self.fingerprints["predict"] = sources.fingerprint(self.examples["predict"])
        for split in [*wanted[stage], *(["predict"] if stage == "predict" else [])]:
            if split not in self.sets:
                self.sets[split] = self._dataset(split)

    def _read_split(self, split: str) -> None:
        examples = self.read(split)
        limit = self.max_train if split == "train" else self.max_eval
        examples = examples[:limit]
        if not examples:
            raise DataError(f"{self.task}: the {split} split of source {self.source} holds no question")
        self.examples[split] = self._distinct_ids(split, examples)
        self.fingerprints[split] = sources.fingerprint(examples)

    def _distinct_ids(self, split: str, examples: list[QAExample]) -> list[QAExample]:
        """Questions are scored by their id: one that comes again gets a number, and a note says so."""
        seen: Counter[str] = Counter()
        taken = {example.question_id for example in examples}
        kept = []
        for example in examples:
            seen[example.question_id] += 1
            if (times := seen[example.question_id]) > 1:
                while (numbered := f"{example.question_id}#{times}") in taken:  # another's own id may look so
                    times += 1
                taken.add(numbered)
                example = replace(example, question_id=numbered)
            kept.append(example)
        again = len(examples) - len(seen)
        if again:
            self.notes.append(f"{again} of {len(examples)} {split} questions have the id of another: numbered #2, ...")
        return kept

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_folder is not None:
            return saved_tokenizer(self.tokenizer_folder)
        if resolve_preset(self.backbone.name, "question_answering") is None:
            return load_tokenizer(self.backbone)
        if "train" not in self.examples:
            self._read_split("train")
        texts = (text for e in self.examples["train"] for text in (e.question, e.context))
        return train_tokenizer(texts, self.vocab_size)

    def _dataset(self, split: str) -> QADataset:
        training = split == "train"
        windower = Windower(self.tokenizer, self.max_length, self.stride, self.max_question)
        examples = self.examples[split]
        if training:
            examples = [e for e in examples if windower.finds_text(e)]
            empty = len(self.examples[split]) - len(examples)
            if empty:
                self.notes.append(f"{empty} of {len(self.examples[split])} training documents are empty: left out")
            if not examples:
                raise DataError(f"{self.task}: every training document is empty")
        long = sum(windower.cuts_question(e.question) for e in examples)
        if long:
            self.notes.append(
                f"{long} of {len(examples)} {split} questions are cut to {self.max_question} tokens; "
                "--data.max_question allows more"
            )
        dataset = QADataset(examples, windower, negative_share=self.negative_share, seed=self.seed, training=training)
        if not len(dataset):
            raise DataError(f"{self.task}: no document of the {split} split holds any text")
        if split != "predict":
            without = sum(not find_mentions(e) for e in examples)
            if without:
                use = "trained as 'not here'" if training else "scored as any other"
                self.notes.append(
                    f"{without} of {len(examples)} {split} questions have no answer in their document: {use}"
                )
        return dataset

    def _asked(self) -> QAExample:
        if not self.question.strip() or not self.document:
            raise ConfigError("predict needs --data.question='...' and --data.document=FILE")
        text = asked_text("document", self.document)
        question = plain(self.question, "--data.question")
        return QAExample("asked", question, ("",), text, title=Path(self.document).stem, answer_starts=())

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse windows longer than the model's positions.

        Raises:
            ConfigError: naming both numbers and the flags to change.
        """
        require_positions(model, self.max_length, f"--data.max_length={self.max_length}")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of (seed, epoch, step)."""
        dataset = self.sets["train"]
        assert self.trainer is not None
        sampler = StepBatchSampler(
            len(dataset),
            self.batch_size,
            self.seed,
            self.trainer,
            first_epoch=self.first_epoch(),
            lengths=[len(e.context) for e in dataset.examples] if self.group_by_length else None,
        )
        return self.loader(dataset, batch_sampler=sampler, collate_fn=Collate(self.padding_token()))

    def first_epoch(self) -> list[int] | None:
        """The order of the first epoch where there is a curriculum."""
        return None

    def val_dataloader(self) -> DataLoader[Any]:
        """Every window of the evaluation questions."""
        return self._evaluation(self.eval_split)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every window of the test questions."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every window of the document that was asked about."""
        return self._evaluation("predict")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        """Windows; one that two processes get changes no best span."""
        return self.share(self.sets[split], collate_fn=Collate(self.padding_token()))

    def example(self, split: str, index: int) -> QAExample:
        """The question a window came from."""
        return self.sets[split].examples[index]

    def describe(self) -> dict[str, Any]:
        """What the record says of the data."""
        asked = "predict" in self.examples
        return {
            "source": "document" if asked else self.source,
            "path": (self.document if asked else self.path) or None,
            "questions": {split: len(examples) for split, examples in self.examples.items()},
            "windows": {split: len(s) for split, s in self.sets.items() if not s.training},
            "fingerprints": dict(self.fingerprints),
            "notes": list(self.notes),
        }


class TriviaQAData(SpanQAData):
    """TriviaQA over Wikipedia pages; `demo` is generated and embedded, `hub` and `local` are the real thing.

    Args:
        source: demo, hub (mandarjoshi/trivia_qa, rc.wikipedia) or local.
        path: For `local`: a folder in the official layout (qa/wikipedia-train.json and evidence/), or with
            train/validation/test.jsonl[.gz] or .parquet in the hub's columns. Each split is its own file.
        demo_train: Generated training questions, for `demo`: 43% about one paragraph, 37% about two or three,
            the rest about whole articles, in this order in the first epoch.
        demo_eval: Generated evaluation questions, for `demo`, about whole articles.
    """

    task = "triviaqa"

    def __init__(
        self,
        source: Literal["demo", "hub", "local"] = "demo",
        path: str = "",
        demo_train: int = 4000,
        demo_eval: int = 200,
        **options: Any,
    ) -> None:
        super().__init__(source, path, **options)
        at_least(1, "question", demo_train=demo_train, demo_eval=demo_eval)
        self.demo_train, self.demo_eval = demo_train, demo_eval

    def read(self, split: str) -> list[QAExample]:
        """See the base class.

        Raises:
            DataError: no such split; the hub's test questions come without answers.
        """
        if self.source == "demo":
            return self._demo(split)
        if self.source == "local":
            return sources.read_triviaqa(self.path, split)
        if split == "test":
            raise _not_public("TriviaQA")
        return sources.read_hub(split)

    def _demo(self, split: str) -> list[QAExample]:
        """Short documents first: matching a name across a long one is hard to begin with."""
        if split != "train":
            return demo.generate(split, self.demo_eval)
        short, middle = self.demo_train * 43 // 100, self.demo_train * 37 // 100
        stages: tuple[tuple[int, int | tuple[int, int]], ...] = (
            (short, 1),
            (middle, (2, 3)),
            (self.demo_train - short - middle, demo.PARAGRAPHS),
        )
        examples = []
        for seed, (count, paragraphs) in enumerate(stages):
            stage = demo.generate("train", count, seed=seed, paragraphs=paragraphs)
            # The generator asks several questions in a row about one article: not into one batch.
            random.Random(derived_seed(self.seed, seed)).shuffle(stage)
            examples += stage
        return examples

    def first_epoch(self) -> list[int] | None:
        """The demo's stages in their order."""
        return list(range(len(self.sets["train"]))) if self.source == "demo" else None


class SquadData(SpanQAData):
    """SQuAD v1.1, a paragraph a question, or a whole article.

    Args:
        source: hub (rajpurkar/squad) or local.
        path: For `local`: one of SQuAD's official JSON files, or the folder that holds it, or a folder with a file for
            each split, whose names say train, dev and test. Of one file whole articles are held out for validation:
            every `holdout`-th.
        holdout: For `local` with one file: the share of articles held out is one in this many.
        whole_articles: For `local`: ask each question about its whole article, in windows as long as those of a
            long-document task, instead of about its paragraph.
    """

    task = "squad"

    def __init__(
        self,
        source: Literal["local", "hub"] = "local",
        path: str = "",
        holdout: int = 8,
        whole_articles: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(source, path, **options)
        if holdout < 2:
            raise ConfigError(f"--data.holdout must be at least 2 articles, got {holdout}")
        if whole_articles and source == "hub":
            raise ConfigError("--data.whole_articles needs --data.source=local: the hub's rows are single paragraphs")
        self.holdout, self.whole_articles = holdout, whole_articles
        self._files: dict[Path, list[QAExample]] = {}

    def read(self, split: str) -> list[QAExample]:
        """See the base class.

        Raises:
            DataError: no such split; SQuAD's test questions are not public.
        """
        if self.source == "hub":
            if split == "test":
                raise _not_public("SQuAD")
            return squad.read_squad_hub(split, self.notes)
        file, own = squad.squad_file(sources.existing(self.path), split)
        if split == "test" and not own:
            raise DataError(
                f"--data.path={self.path} has no test split: of one file, the articles held out are the validation "
                "split; astbench validate evaluates on it"
            )
        if file not in self._files:
            self._files[file] = squad.read_squad_file(file, self.whole_articles, self.notes)
        examples = self._files[file]
        if own:
            return examples
        articles = list(dict.fromkeys(e.article for e in examples))
        if split == "train" and len(articles) == 1:
            raise DataError(
                f"--data.path={self.path} holds one article, and articles are held out whole: none is left to train on"
            )
        held = set(articles[:: self.holdout])
        return [e for e in examples if (e.article in held) != (split == "train")]


def _not_public(name: str) -> DataError:
    return DataError(
        f"the test answers of {name} are not public, and --data.source=hub has none: astbench validate evaluates on "
        "the validation split"
    )
