"""Language modelling: perplexity per token and per word, and continuing a prompt."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from astbench.backbones.load import max_positions
from astbench.errors import ConfigError
from astbench.tasks.base import gathered
from astbench.tasks.lm.config import LanguageModelConfig
from astbench.tasks.lm.data import WikiTextData, tokenizer_name
from astbench.training.module import TaskModule
from astbench.training.seeds import derived_seed
from astbench_registry.registry import make_config

LOGITS_AT_A_TIME = 2**25
"""Whose log-softmax is held at once while training: 128 MiB."""


class Scored(NamedTuple):
    """What one window adds: -log p of its scored tokens, how many they are, and what of the text they are."""

    nll: float
    tokens: int
    words: int
    bytes: int
    recall_nll: float
    recalls: int


class LanguageModel(TaskModule):
    """Perplexity of a causal language model: exp(sum of -log p / number of scored tokens).

    Context and stride decide the number, so they stand in its signature; see :class:`WikiTextData`. Per word: the same
    sum over the number of words, as WikiText counts them: split at white space, and one `<eos>` a line. A word belongs
    to the token that it ends in, and is counted when that one is scored.
    """

    head = "causal_lm"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.config = LanguageModelConfig(**(task or {}))
        self.can = make_config(attention["name"], {k: v for k, v in attention.items() if k != "name"}).can
        self.results: dict[str, Any] = {}
        self._scored: dict[int, Scored] = {}
        self._written: list[int] = []

    @classmethod
    def needs(cls, command: str, data: Any) -> dict[str, bool]:
        """Padding in training batches of separate articles; decoding to continue a prompt."""
        return {"padded": command == "fit" and data.documents == "separate", "decode": command == "predict"}

    @property
    def data(self) -> WikiTextData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Refuse prompts that leave no room to write; say what one pass cannot promise."""
        if self.model is not None:
            return
        super().configure_model()
        assert self.model is not None
        prompt, room = self.data.prompt_ids, max_positions(self.model)
        if prompt is not None and len(prompt) + self.config.max_new_tokens > room:
            raise ConfigError(
                f"the prompt's {len(prompt)} tokens and --task.max_new_tokens={self.config.max_new_tokens} are more "
                f"than the backbone's {room} positions; shorten one of them"
            )
        if not self.can.strictly_causal and not self.config.incremental:
            self.swapped.notes.append(
                f"{self.attention['name']} chooses a token's keys with later tokens in sight: perplexity in one pass "
                "flatters it; --task.incremental=true scores token by token"
            )

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """-log p of tokens 1.. of each window, `(batch, length - 1)`, float32."""
        assert self.model is not None
        ids = batch["input_ids"]
        padding = {"attention_mask": batch["attention_mask"].long()} if "attention_mask" in batch else {}
        logits = self.model(input_ids=ids, use_cache=False, **padding).logits[:, :-1]
        return token_losses(logits.flatten(0, 1), ids[:, 1:].flatten()).view(len(ids), -1)

    def token_by_token(self, ids: Tensor, scored: int) -> Tensor:
        """As :meth:`forward`, each token from those before it alone; only the last `scored` tokens, the rest is 0."""
        assert self.model is not None
        nll = torch.zeros(ids.shape[0], ids.shape[1] - 1, device=ids.device)
        cache, seen = None, 0
        for known in range(ids.shape[1] - scored, ids.shape[1]):
            out = self.model(input_ids=ids[:, seen:known], past_key_values=cache, use_cache=self.can.decode)
            if self.can.decode:
                cache, seen = out.past_key_values, known
            logits = out.logits[:, -1].float()
            nll[:, known - 1] = torch.nn.functional.cross_entropy(logits, ids[:, known], reduction="none")
        return nll

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean -log p over the batch's tokens, and the attention's own losses."""
        nll = self(batch)
        if "attention_mask" not in batch:
            return self.total_loss(nll.mean(), nll.mean(1))
        real = batch["attention_mask"][:, 1:]
        return self.total_loss(nll[real].mean(), (nll * real).sum(1) / real.sum(1).clamp(min=1))

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the evaluation before."""
        self._scored.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up the scored tokens."""
        if self.config.incremental:
            nll = self.token_by_token(batch["input_ids"], int(batch["scored"].max()))
        else:
            nll = self(batch)
        counts = zip(*(batch[name].tolist() for name in ("index", "scored", "words", "bytes")), strict=True)
        for row, recall, (index, scored, words, size) in zip(nll, batch["recall"], counts, strict=True):
            row, recall = row[-scored:].double(), recall[-scored:]
            recalled = float(row[recall].sum()), int(recall.sum())
            self._scored[index] = Scored(float(row.sum()), scored, words, size, *recalled)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Perplexity over everything scored."""
        self._finish("val", self.data.eval_split)

    def on_test_epoch_end(self) -> None:
        """Perplexity over everything scored."""
        self._finish("test", "test")

    def _finish(self, stage: str, split: str) -> None:
        windows: dict[int, Scored] = gathered(self.trainer, self._scored)
        total = Scored(*(sum(part) for part in zip(*windows.values(), strict=True)))
        metrics = perplexities(total)
        self.results = {
            "metrics": metrics,
            "signature": self._signature(total, self.data.about[split]["file"]),
            "split": split,
            "strictly_causal": self.can.strictly_causal,
            "items": {str(index): {"nll": w.nll / w.tokens, "tokens": w.tokens} for index, w in windows.items()},
        }
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "perplexity", rank_zero_only=True)

    def _signature(self, total: Scored, file: str) -> str:
        data = self.data
        stride = data.step if data.windows is None or data.documents == "separate" else "none"
        begins = f" (the first of them {data.begins}, never scored)" if data.begins else ""
        recalls = f"; recall: {total.recalls} tokens known from far before" if total.recalls else ""
        steps = "; token by token" if self.config.incremental else ""
        if steps:
            steps += " with the KV cache" if self.can.decode else ", from each prefix anew"
        context = f"context {data.context}{begins}"
        return (
            f"perplexity per token ({tokenizer_name(data.tokenizer)}), {context}, stride {stride}, "
            f"{total.tokens} tokens scored of {file}, articles {data.documents}; per word: the same nll over "
            f"{total.words} words, split at white space and one <eos> a line{recalls}{steps}"
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        """Continue the prompt with the KV cache; the new tokens."""
        assert self.model is not None
        torch.manual_seed(derived_seed(self.seed))
        ids, end = batch["input_ids"], self.data.tokenizer.eos_token_id
        sampled = self.config.temperature > 0
        settings = GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            do_sample=sampled,
            # All tokens may be drawn: a pretrained model's own settings would cut some off.
            **({"temperature": self.config.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        )
        generate: Any = self.model.generate
        out = generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        self._written = out[0, ids.shape[1] :].tolist()
        return self._written

    def on_predict_epoch_end(self) -> None:
        """The text that follows."""
        assert self.data.prompt_ids is not None
        decode = self.data.tokenizer.decode
        temperature = self.config.temperature
        how = f"sampled at temperature {temperature:g}, seed {self.seed}" if temperature > 0 else "greedy"
        added = self.data.prompt_added
        prompt = f"{len(self.data.prompt_ids)}" + (f" with {' and '.join(added)} from its tokenizer" if added else "")
        texts = {
            "prompt": str(decode(self.data.prompt_ids.tolist())),
            "text": str(decode(self._written, skip_special_tokens=True)),
        }
        self.results = {
            "signature": f"{len(self._written)} tokens after a prompt of {prompt}, {how}",
            "metrics": {},
            "continuation": {**texts, "tokens": self._written},
        }
        self.answers = {
            "prompt": texts["prompt"].replace("\n", "\\n"),
            "continuation": texts["text"].replace("\n", "\\n"),
        }


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target: `(tokens, vocabulary)`, int64 `(tokens,)` -> float32 `(tokens,)`.

    Some tokens at a time, their log-softmax made again for the gradient: a window of 8,192 tokens has logits of 1.6 GB.
    """
    step = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    parts = zip(logits.split(step), targets.split(step), strict=True)
    if len(logits) <= step:
        return _token_losses(logits, targets)
    return torch.cat([checkpoint(_token_losses, *part, use_reentrant=False) for part in parts])


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def perplexities(total: Scored) -> dict[str, float]:
    """Per token and per word, bits per byte, and apart those of the tokens known from far before, where any are."""
    found = {
        "perplexity": _exp(total.nll / total.tokens),
        "nll": total.nll / total.tokens,
        "bits_per_byte": total.nll / math.log(2) / total.bytes,
    }
    if total.words:  # a few tokens may hold no end of a word
        found["word_perplexity"] = _exp(total.nll / total.words)
    if total.recalls:
        found["recall_perplexity"] = _exp(total.recall_nll / total.recalls)
    return found


def _exp(value: float) -> float:
    """Infinite where a model is so wrong that no float can say it."""
    return float(torch.tensor(value, dtype=torch.float64).exp())
