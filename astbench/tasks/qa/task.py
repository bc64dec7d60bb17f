"""Extractive question answering: a span of the document, its start and end scored per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astbench.tasks.base import of_all_processes
from astbench.tasks.qa.config import SpanQAConfig
from astbench.tasks.qa.data import SpanQAData
from astbench.tasks.qa.metrics import NORMALIZERS, mean, score
from astbench.training.module import TaskModule


class SpanQA(TaskModule):
    """Start and end scores over the document's tokens; the first token stands for "not in this window".

    Training maximises the summed probability of all mentions of the answer (Clark and Gardner 2018,
    arXiv 1710.10723, eq. 1), start and end apart. A question's answer is the best span over all windows, by
    (start + end) - (null start + null end), which windows of one document can be compared by.
    """

    head = "question_answering"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.config = SpanQAConfig(**(task or {}))
        self.guesses: dict[int, tuple[float, str]] = {}
        self.results: dict[str, Any] = {}

    @property
    def data(self) -> SpanQAData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Start and end scores `(batch, length)`, float32, -inf outside the document and the first token."""
        assert self.model is not None
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].long()}
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        # The question, and the first token: what Longformer's QA models attend to globally (its section 5).
        self.swapped.set_global_tokens(batch["attention_mask"] & (batch["answerable"].cumsum(1) == 0))
        out = self.model(**inputs)
        allowed = batch["answerable"].clone()
        allowed[:, 0] = True
        start, end = out.start_logits.float(), out.end_logits.float()
        return start.masked_fill(~allowed, -torch.inf), end.masked_fill(~allowed, -torch.inf)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Marginal likelihood of the mentions, and the attention's own losses."""
        start, end = self(batch)
        each = (marginal_nll(start, batch["starts"]) + marginal_nll(end, batch["ends"])) / 2
        return self.total_loss(each.mean(), each)

    def on_validation_epoch_start(self) -> None:
        """Forget the guesses of the evaluation before."""
        self.guesses.clear()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep the best span of each question."""
        self._collect(batch, self.data.eval_split)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep the best span of each question."""
        self._collect(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[float]:
        """Keep the best span of the question; the values of the batch's windows."""
        return self._collect(batch, "predict")

    def _collect(self, batch: dict[str, Any], split: str) -> list[float]:
        start, end = self(batch)
        values, firsts, lasts = best_spans(start, end, batch["answerable"], self.config.max_answer_tokens)
        row = torch.arange(len(values), device=values.device)
        begins, ends = batch["offsets"][row, firsts, 0], batch["offsets"][row, lasts, 1]
        rows = zip(batch["index"].tolist(), values.tolist(), begins.tolist(), ends.tolist(), strict=True)
        for index, value, begin, stop in rows:
            text = self.data.example(split, index).context[begin:stop]
            if index not in self.guesses or value > self.guesses[index][0]:
                self.guesses[index] = (value, text)
        return values.tolist()

    def on_validation_epoch_end(self) -> None:
        """EM and F1 over the questions."""
        self._finish("val", self.data.eval_split)

    def on_test_epoch_end(self) -> None:
        """EM and F1 over the questions."""
        self._finish("test", "test")

    def on_predict_epoch_end(self) -> None:
        """The answer, and how much better than "not in this document" it scored."""
        guesses = self._all_guesses()
        value, answer = guesses[0]
        asked = self.data.example("predict", 0)
        self.results = {
            "signature": asked.question,
            "metrics": {},
            "answer": {"text": answer, "above_null": value, "windows": len(self.data.sets["predict"])},
        }
        doubt = "" if value > 0 else ", below 'not in this document'"
        windows = len(self.data.sets["predict"])
        self.answers = {"answer": answer, "score": f"{value:.2f} above no answer, over {windows} windows{doubt}"}

    def _finish(self, stage: str, split: str) -> None:
        guesses = self._all_guesses()
        examples = self.data.examples[split]
        normalize = NORMALIZERS[self.data.task]
        answers = {e.question_id: e.answers for e in examples}
        # A span of nothing but blanks answers nothing.
        predictions = {self.data.example(split, i).question_id: t for i, (_, t) in guesses.items() if t.strip()}
        items = score(predictions, answers, normalize)
        titles = score({e.question_id: e.title for e in examples}, answers, normalize)
        metrics = {
            "f1": mean(row["f1"] for row in items.values()),
            "em": mean(row["em"] for row in items.values()),
            # What always answering with the document's title would get.
            "title_f1": mean(row["f1"] for row in titles.values()),
        }
        self.results = {
            "metrics": metrics,
            "signature": f"{self.data.task} official normalisation, maximum over aliases, {len(items)} questions",
            "split": split,
            "items": {q: {**row, "prediction": predictions.get(q, "")} for q, row in items.items()},
        }
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "f1", rank_zero_only=True)

    def _all_guesses(self) -> dict[int, tuple[float, str]]:
        """Best guesses over all processes."""
        best: dict[int, tuple[float, str]] = {}
        for part in of_all_processes(self.trainer, self.guesses):
            for index, guess in part.items():
                best[index] = max(best.get(index, guess), guess)
        return best


def marginal_nll(logits: Tensor, right: Tensor) -> Tensor:
    """-log of the summed probability of the right tokens, `(batch,)`.

    Args:
        logits: `(batch, length)`, -inf where a token cannot be meant.
        right: Bool `(batch, length)`, at least one True a row.
    """
    return torch.logsumexp(logits, -1) - torch.logsumexp(logits.masked_fill(~right, -torch.inf), -1)


def best_spans(start: Tensor, end: Tensor, answerable: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best span of each window.

    Args:
        start: Start scores `(batch, length)`; token 0 is the null answer.
        end: End scores, as `start`.
        answerable: Bool `(batch, length)`: tokens of the document.
        longest: Most tokens of a span.

    Returns:
        Value relative to the null answer, first and last token, each `(batch,)`. Exact: every span of at most
        `longest` tokens is looked at, O(length x longest).
    """
    length = start.shape[1]
    longest = min(longest, length)
    start_in, end_in = (x.masked_fill(~answerable, -torch.inf) for x in (start, end))
    padded = torch.nn.functional.pad(end_in, (0, longest - 1), value=-torch.inf)
    spans = start_in.unsqueeze(-1) + padded.unfold(1, longest, 1)  # (batch, length, span length - 1)
    value, where = spans.flatten(1).max(-1)
    first = where // longest
    return value - start[:, 0] - end[:, 0], first, first + where % longest
