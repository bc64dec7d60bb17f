"""Texts that a causal model goes on with, one token of each a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from astbench.backbones.side_by_side import SideBySide
from astbench.errors import ConfigError
from astbench.serving.engine import Done, Job, NotFinite


@dataclass(frozen=True)
class Continuation:
    """What a job of the writer is to do.

    Attributes:
        prompt: Token ids.
        max_tokens: Most tokens to write.
        ends: Tokens that end the text; the last of what is written is one of them, or `max_tokens` were.
        temperature: 0 takes the likeliest token each time.
        top_p: Only the likeliest tokens that have this much of the probability are drawn from.
        seed: Of the draws.
    """

    prompt: Sequence[int]
    max_tokens: int
    ends: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False)
class _Text:
    job: Job
    work: Continuation
    cache: DynamicCache
    draws: torch.Generator
    last: int = -1
    written: int = field(default=0)


class Writer:
    """Prompts are read one by one, each as it would be alone; then all texts take a step together.

    Emits every token as an int, then :class:`Done` with "stop" or "length".

    Args:
        model: Causal, with a swapped attention that can decode, in evaluation mode.
        capacity: Texts at a time.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.capacity, self.at_once = capacity, 1
        self._model: Callable[..., Any] = model
        self._config, self._device = model.config, model.device
        # A prompt of 8,192 tokens has logits of 1.6 GB, and the last ones are all that is asked for.
        few = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._few = {"logits_to_keep": 1} if few else {}
        self._texts: dict[Job, _Text] = {}

    @property
    def running(self) -> Sequence[Job]:
        """See :class:`astbench.serving.engine.Worker`."""
        return list(self._texts)

    @torch.inference_mode()
    def admit(self, job: Job) -> None:
        """Read the prompt, and write the first token."""
        work: Continuation = job.work
        generator = torch.Generator(self._device).manual_seed(work.seed)
        text = _Text(job, work, DynamicCache(config=self._config), generator)
        ids = torch.tensor([list(work.prompt)], device=self._device)
        out = self._model(input_ids=ids, past_key_values=text.cache, use_cache=True, **self._few)
        self._texts[job] = text
        self._write([text], out.logits[:, -1])

    @torch.inference_mode()
    def step(self) -> None:
        """One more token of every text."""
        texts = list(self._texts.values())
        ids = torch.tensor([[text.last] for text in texts], device=self._device)
        positions = torch.tensor([[text.cache.get_seq_length()] for text in texts], device=self._device)
        cache = texts[0].cache if len(texts) == 1 else SideBySide([text.cache for text in texts])
        out = self._model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        self._write(texts, out.logits[:, -1])

    def drop(self, job: Job) -> None:
        """See :class:`astbench.serving.engine.Worker`."""
        self._texts.pop(job, None)

    def _write(self, texts: Sequence[_Text], logits: Tensor) -> None:
        """Choose each text's next token from its logits `(texts, vocabulary)`."""
        logits = logits.float()
        finite, likeliest = torch.isfinite(logits).all(-1).tolist(), logits.argmax(-1).tolist()
        for row, text in enumerate(texts):
            if not finite[row]:
                self.drop(text.job)
                text.job.emit(NotFinite())
                continue
            text.last = likeliest[row] if text.work.temperature == 0 else _drawn(logits[row], text)
            text.written += 1
            text.job.emit(text.last)
            ended = text.last in text.work.ends
            if ended or text.written == text.work.max_tokens:
                self.drop(text.job)
                text.job.emit(Done("stop" if ended else "length"))


def _drawn(logits: Tensor, text: _Text) -> int:
    """A token at random, of the likeliest that have `top_p` of the probability (Holtzman et al. 2020)."""
    weights, order = torch.softmax(logits / text.work.temperature, -1).sort(descending=True)
    weights[weights.cumsum(-1) - weights >= text.work.top_p] = 0  # the likeliest always stays
    return int(order[torch.multinomial(weights, 1, generator=text.draws)])


CLOSE = 1e-3
"""Largest difference of logits, over the largest logit, by which a text alone and one of several may differ."""

ROUNDINGS = 8
"""The same of models in half precision, in units of its last digit."""


@torch.inference_mode()
def check_writes_together(model: PreTrainedModel) -> None:
    """Refuse a model whose texts would not be written together as each alone, such as one that heeds no positions.

    Raises:
        ConfigError: they differ.
    """
    call: Callable[..., Any] = model
    lengths, alone, caches = (5, 3), [], []
    last = torch.ones(len(lengths), 1, dtype=torch.long, device=model.device)
    for row, length in enumerate(lengths):
        own, other = (DynamicCache(config=model.config) for _ in range(2))
        for cache in (own, other):
            prompt = torch.arange(length, device=model.device)[None] % model.config.vocab_size
            call(input_ids=prompt, past_key_values=cache, use_cache=True)
        alone.append(call(input_ids=last[row : row + 1], past_key_values=own, use_cache=True).logits[:, -1])
        caches.append(other)
    positions = torch.tensor(lengths, device=model.device)[:, None]
    together = call(input_ids=last, position_ids=positions, past_key_values=SideBySide(caches), use_cache=True)
    wanted = torch.cat(alone).float()
    close = max(CLOSE, ROUNDINGS * torch.finfo(model.dtype).eps)
    if float((together.logits[:, -1] - wanted).abs().max()) > close * max(1.0, float(wanted.abs().max())):
        raise ConfigError(f"{type(model).__name__} does not write several texts together as each alone; not served")
