"""Recall probes: a causal language model is asked for what stands far back in its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from astbench.tasks.base import gathered
from astbench.tasks.generated import by_group, share_of
from astbench.tasks.recall.data import IGNORED, RecallData
from astbench.training.module import TaskModule


class Recall(TaskModule):
    """Next-token prediction at the labelled positions alone, and how many questions are answered right.

    An answer is right when each of its tokens is the most probable one after the right tokens before it. That is
    the case exactly when greedy decoding writes the answer, so one pass over the whole input tells it. (For an
    attention that is not strictly causal the pass may know more than decoding would; `astbench list` marks those.)
    """

    head = "causal_lm"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.right: dict[int, list[bool]] = {}
        self.results: dict[str, Any] = {}

    @property
    def data(self) -> RecallData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits at the labelled positions, `(number of them in the batch, vocabulary)`, float32."""
        assert self.model is not None
        out = self.model.base_model(input_ids=batch["input_ids"], use_cache=False)
        # A few positions of each sequence are asked about: the vocabulary's matrix meets only those.
        asked = out.last_hidden_state[batch["labels"] != IGNORED]
        return self.model.get_output_embeddings()(asked).float()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy of the answers' tokens, and the attention's own losses."""
        labels = batch["labels"]
        asked = labels != IGNORED
        losses = cross_entropy(self(batch), labels[asked], reduction="none")
        each = losses.new_zeros(asked.shape).masked_scatter(asked, losses).sum(1) / asked.sum(1)
        return self.total_loss(losses.mean(), each)

    def on_validation_epoch_start(self) -> None:
        """Forget the answers of the evaluation before."""
        self.right.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep which questions are answered right."""
        asked = batch["labels"] != IGNORED
        right = self(batch).argmax(-1) == batch["labels"][asked]
        rows = batch["index"][:, None].expand_as(asked)[asked]
        tokens = zip(rows.tolist(), batch["question"][asked].tolist(), right.tolist(), strict=True)
        for index in batch["index"].tolist():
            self.right[index] = [True] * self.data.num_questions
        for index, question, ok in tokens:
            self.right[index][question] &= ok

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Accuracy over the questions."""
        self._finish("val", self.data.eval_split)

    def on_test_epoch_end(self) -> None:
        """Accuracy over the questions."""
        self._finish("test", "test")

    def _finish(self, stage: str, split: str) -> None:
        rows = gathered(self.trainer, self.right)
        answers = [
            (group, ok)
            for index, right in rows.items()
            for group, ok in zip(self.data.groups(split, index), right, strict=True)
        ]
        accuracy = share_of([ok for _, ok in answers])
        self.results = {
            "metrics": {"accuracy": accuracy},
            "signature": f"{self.data.signature}, {len(answers)} questions in {len(rows)} inputs",
            "split": split,
            f"accuracy_by_{self.data.grouped_by}": by_group(sorted(answers, key=lambda a: _number(a[0]))),
            "items": {str(i): {"accuracy": share_of(ok), "right": list(map(int, ok))} for i, ok in rows.items()},
        }
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, rank_zero_only=True)


def _number(group: str) -> float:
    return float(group.split("-")[0])
