"""Language modelling: perplexity per token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from astbench.tasks.lm_data import WikiTextData, tokenizer_name
from astbench.training import TaskModule


class LanguageModel(TaskModule):
    """Perplexity of a causal language model: exp(sum of -log p / number of scored tokens).

    Context and stride decide the number, so they stand in its signature; see :class:`WikiTextData`.
    """

    head = "causal_lm"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.results: dict[str, Any] = {}
        self._nll, self._count = 0.0, 0
        self._windows: list[float] = []

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """-log p of tokens 1.. of each window, `(batch, length - 1)`, float32."""
        assert self.model is not None
        ids = batch["input_ids"]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        return nll

    def on_test_epoch_start(self) -> None:
        """Forget the sums of the evaluation before."""
        self._nll, self._count, self._windows = 0.0, 0, []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up the scored tokens."""
        nll = self(batch)
        for row, scored in zip(nll, batch["scored"].tolist(), strict=True):
            total = float(row[-scored:].double().sum())
            self._nll += total
            self._count += scored
            self._windows.append(total / scored)

    def on_test_epoch_end(self) -> None:
        """Perplexity over everything scored."""
        data: WikiTextData = self.trainer.datamodule  # type: ignore[attr-defined]
        perplexity = math.exp(self._nll / self._count)
        self.results = {
            "metrics": {"perplexity": perplexity, "nll": self._nll / self._count},
            "signature": f"perplexity per token ({tokenizer_name(data.tokenizer)}), context {data.context}, stride "
            f"{data.stride if data.windows is None else 'none'}, {self._count} tokens scored of {data.about['file']}",
            "split": "test",
            "items": {str(i): {"nll": value} for i, value in enumerate(self._windows)},
        }
        self.log("test/perplexity", perplexity, rank_zero_only=True)
