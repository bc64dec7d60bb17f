"""Sequence classification by an encoder from scratch, of one sequence or of a pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from astbench.backbones.load import require_positions
from astbench.tasks.base import gathered
from astbench.tasks.guesses import accuracies, items_of
from astbench.tasks.lra.base_data import SequenceClassificationData
from astbench.tasks.lra.config import SequenceClassifierConfig
from astbench.training.module import TaskModule
from astbench_registry.registry import make_config

CLASSIFIER = "classifier"
"""Name of the layers on top, as a part of the Hugging Face model, so that they are saved and loaded with it."""


class SequenceClassifier(TaskModule):
    """Encoder, pooling, one hidden layer, classes, as in the Long Range Arena (Tay et al. 2021, arXiv 2011.04006).

    A pair is encoded apart by the same encoder ("two towers"); its classifier sees both pooled outputs, their
    difference and their product (the arena's code calls that the NLI interaction).
    """

    head = "sequence_classification"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.config = SequenceClassifierConfig(**(task or {}))
        self.guesses: dict[int, tuple[int, int]] = {}
        self.results: dict[str, Any] = {}

    @property
    def data(self) -> SequenceClassificationData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def build_model(self) -> PreTrainedModel:
        """The encoder with the classifier as one of its parts."""
        model = super().build_model()
        if self.config.pooling == "cls":
            self._check_cls(model)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]  # BERT's own, which nothing would use
        hidden = model.config.hidden_size * (4 if self.data.paired else 1)
        inner = model.config.intermediate_size
        layers = nn.Sequential(nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, self.data.num_classes))
        model.add_module(CLASSIFIER, layers)
        return model

    def _check_cls(self, model: PreTrainedModel) -> None:
        """Inputs are one token longer than the data module said."""
        longer, flag = self.data.length + 1, f"--task.pooling=cls with --data.{self.data.length_option}"
        require_positions(model, longer, f"{flag}={longer}")
        options = {key: value for key, value in self.attention.items() if key != "name"}
        can = make_config(self.attention["name"], options).can
        can.check(self.attention["name"], "bidirectional_self", length=longer, length_flag=flag)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits of the classes, `(batch, num_classes)`, float32."""
        assert self.model is not None
        # The two sequences of a pair lie below one another in the batch.
        pooled = self._pool(batch["input_ids"], batch.get("attention_mask"))
        if self.data.paired:
            one, two = pooled.chunk(2)
            pooled = torch.cat([one, two, one - two, one * two], -1)
        return self.model.get_submodule(CLASSIFIER)(pooled).float()

    def _pool(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        assert self.model is not None
        if self.config.pooling == "cls":
            ids = pad(ids, (1, 0), value=self.data.tokenizer.cls_token_id)
            mask = None if mask is None else pad(mask, (1, 0), value=True)
        if mask is None:
            hidden = self.model(input_ids=ids).last_hidden_state
            return hidden[:, 0] if self.config.pooling == "cls" else hidden.mean(1)
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.config.pooling == "cls":
            return hidden[:, 0]
        return hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy, and the attention's own losses."""
        each = cross_entropy(self(batch), batch["label"], reduction="none")
        return self.total_loss(each.mean(), torch.cat([each, each]) if self.data.paired else each)

    def on_validation_epoch_start(self) -> None:
        """Forget the guesses of the evaluation before."""
        self.guesses.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep the most probable class of each example, and the right one."""
        guessed = self(batch).argmax(-1).tolist()
        rows = zip(batch["index"].tolist(), guessed, batch["label"].tolist(), strict=True)
        self.guesses.update({index: (guess, right) for index, guess, right in rows})

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Accuracy."""
        self._finish("val", self.data.eval_split)

    def on_test_epoch_end(self) -> None:
        """Accuracy."""
        self._finish("test", "test")

    def _finish(self, stage: str, split: str) -> None:
        rows = gathered(self.trainer, self.guesses)
        metrics = accuracies(rows)
        self.results = {
            "metrics": metrics,
            "signature": f"{self.data.signature}, {self.config.pooling} pooling, {len(rows)} examples",
            "split": split,
            "items": items_of(rows),
        }
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", rank_zero_only=True)
