"""Translation with an encoder-decoder: cross-entropy with smoothed labels, beam search, BLEU."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from astbench.errors import ConfigError
from astbench.tasks.base import gathered
from astbench.tasks.mt.batches import IGNORED
from astbench.tasks.mt.config import PLACES, TranslationConfig
from astbench.tasks.mt.data import TranslationData
from astbench.training.averaging import KEY, WeightAverage, final_weights
from astbench.training.module import TaskModule
from astbench.training.sharding import FullyShardedStrategy
from astbench_registry import Pattern
from astbench_registry.registry import make_config

SHOWN = 5
"""Lines of a file whose translation `predict` prints; all are in `items.json`."""


class Translation(TaskModule):
    """A sequence-to-sequence model of Hugging Face, trained with teacher forcing.

    Evaluation translates by beam search and scores the detokenized text with sacreBLEU.
    """

    head = "seq2seq"
    fixed_task_options = ("where",)

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.config = TranslationConfig(**(task or {}))
        self.where = self.config.places
        self.average: WeightAverage | None = None
        self.translations: dict[int, str] = {}
        self.results: dict[str, Any] = {}

    @classmethod
    def patterns(cls, task: TranslationConfig) -> dict[str, Pattern]:
        """See the base class."""
        return {place: PLACES[place] for place in task.places}

    @property
    def data(self) -> TranslationData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits `(batch, target length, vocabulary)`, float32, of each target token given those before it."""
        model: Any = self.model  # transformers types the methods of its models as tensors
        labels = batch["labels"]
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"].long(),
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=labels),
            decoder_attention_mask=(labels != IGNORED).long(),
            use_cache=False,
        )
        logits: Tensor = out.logits
        return logits.float()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy per target token, with smoothed labels, and the attention's own losses."""
        logits = self(batch)
        labels = batch["labels"]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.config.label_smoothing,
            reduction="none",
        )
        losses = losses.view(labels.shape).sum(1)
        tokens = (labels != IGNORED).sum(1)
        return self.total_loss(losses.sum() / tokens.sum(), losses / tokens)

    # -- the mean of the last weights -------------------------------------------------------------------

    def configure_model(self) -> None:
        """See the base class; refuse a mean that would begin before the training does."""
        super().configure_model()
        config, steps = self.config, self.trainer.max_steps
        if config.average == 1 or self.average is not None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if (config.average - 1) * config.average_every >= steps:
            raise ConfigError(
                f"--task.average={config.average} times --task.average_every={config.average_every} steps begin "
                f"before the training of --trainer.max_steps={steps}; lower one of them"
            )
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            raise ConfigError(
                f"--task.average={config.average} needs whole weights in every process: set --task.average=1, or "
                "--trainer.strategy=ddp"
            )
        self.average = WeightAverage(config.average, config.average_every, steps)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The mean takes the weights in when it is time."""
        if self.average is not None:
            self.average.after_step(self.global_step, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The mean so far goes along."""
        if self.average is not None:
            checkpoint[KEY] = self.average.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run goes on with its mean; an evaluation uses it."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            checkpoint["state_dict"] = final_weights(checkpoint)
        elif self.average is not None:
            self.average.restore(checkpoint[KEY])
        super().on_load_checkpoint(checkpoint)

    # -- evaluation -------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the translations of the evaluation before; after the training, evaluate the mean."""
        self.translations.clear()
        if self.average is not None and self.trainer.state.fn != TrainerFn.FITTING:
            self.load_state_dict(final_weights({KEY: self.average.state()}))

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Translate."""
        self._translate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Translate."""
        self._translate(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Translate; what was found stands in as the target when the attention is looked at."""
        batch["labels"] = self._translate(batch)
        return [self.translations[index] for index in batch["index"].tolist()]

    def _translate(self, batch: dict[str, Any]) -> Tensor:
        """Keep each sentence's translation; their tokens as labels."""
        tokenizer = self.data.tokenizer
        found = self.search(batch["input_ids"], batch["attention_mask"], self.data.max_length)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        self.translations.update(zip(batch["index"].tolist(), (text.strip() for text in texts), strict=True))
        # Padding begins after the first end.
        end = found == tokenizer.eos_token_id
        return found.masked_fill((end.cumsum(1) - end.long()) > 0, IGNORED)

    def search(self, sources: Tensor, real: Tensor, longest: int, **more: Any) -> Tensor:
        """Translate by beam search; `(batch, tokens)`, without the token that starts the decoder.

        Args:
            sources: Token ids `(batch, length)`.
            real: `(batch, length)`, True or 1 where a token is no padding.
            longest: Most tokens of a translation.
            more: What else `generate` is told.
        """
        model: Any = self.model
        found: Tensor = model.generate(
            input_ids=sources,
            attention_mask=real.long(),
            num_beams=self.config.beams,
            length_penalty=self.config.length_penalty,
            do_sample=False,
            max_new_tokens=longest,
            use_cache=self._decodes(),
            **more,
        )
        return found[:, 1:]

    def _decodes(self) -> bool:
        """Whether a step with the cache gives what a whole pass does; else every step is a whole pass."""
        options = {key: value for key, value in self.attention.items() if key != "name"}
        return self.where == ("encoder_self",) or make_config(self.attention["name"], options).can.decode

    def on_validation_epoch_end(self) -> None:
        """BLEU and chrF."""
        self._finish("val", self.data.eval_split)

    def on_test_epoch_end(self) -> None:
        """BLEU and chrF."""
        self._finish("test", "test")

    def on_predict_epoch_end(self) -> None:
        """The translation of every line."""
        found, sentences = gathered(self.trainer, self.translations), self.data.sentences
        self.results = {
            "signature": self._search(),
            "metrics": {},
            "items": {
                str(number): {"source": sentence, "prediction": found.get(number - 1, "")}
                for number, sentence in enumerate(sentences, 1)
            },
        }
        shown = [found.get(index, "") for index in range(len(sentences))][:SHOWN]
        self.answers = {"translation": shown[0]} if self.data.text else {f"line {n}": t for n, t in enumerate(shown, 1)}

    def _finish(self, stage: str, split: str) -> None:
        found, references = gathered(self.trainer, self.translations), self.data.references(split)
        hypotheses = [found[index] for index in range(len(references))]
        bleu, chrf = BLEU(), CHRF()
        metrics = {
            "bleu": bleu.corpus_score(hypotheses, [references]).score,
            "chrf": chrf.corpus_score(hypotheses, [references]).score,
        }
        self.results = {
            "metrics": metrics,
            "signature": f"BLEU {bleu.get_signature()}; chrF2 {chrf.get_signature()}; "
            f"{self.data.test_set(split)}; {self._search()}",
            "split": split,
            "items": score_sentences(hypotheses, references),
        }
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "bleu", rank_zero_only=True)

    def _search(self) -> str:
        config = self.config
        mean = f", mean of the weights at {config.average} steps" if config.average > 1 else ""
        return f"beam {config.beams}, length penalty {config.length_penalty}{mean}"

    def real_lengths(self, batch: dict[str, Any], pattern: Pattern) -> tuple[int, int] | None:
        """See the base class: sources and targets have lengths of their own."""
        source, target = int(batch["attention_mask"][0].sum()), int((batch["labels"][0] != IGNORED).sum())
        lengths = {
            "bidirectional_self": (source, source),
            "causal_self": (target, target),
            "causal_cross": (target, source),
        }
        return lengths[pattern]


def score_sentences(hypotheses: list[str], references: list[str]) -> dict[str, dict[str, Any]]:
    """By line number from 1: the hypothesis, its BLEU (of the orders it has n-grams of) and its chrF."""
    bleu, chrf = BLEU(effective_order=True), CHRF()
    return {
        str(number): {
            "bleu": bleu.sentence_score(hypothesis, [reference]).score,
            "chrf": chrf.sentence_score(hypothesis, [reference]).score,
            "prediction": hypothesis,
        }
        for number, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True), 1)
    }
