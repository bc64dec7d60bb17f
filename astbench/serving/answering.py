"""Answers read off documents: windows of several questions in one batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from astbench.serving.engine import Done, Job, NotFinite
from astbench.tasks.qa.examples import QAExample
from astbench.tasks.qa.task import SpanQA, best_spans
from astbench.tasks.qa.windows import Collate, Window


@dataclass(frozen=True)
class Question:
    """What a job of the answerer is to do.

    Attributes:
        example: Question and document.
        windows: The document, cut; at least one.
    """

    example: QAExample
    windows: Sequence[Window]


@dataclass(frozen=True)
class Answer:
    """The best span of a document.

    Attributes:
        text: As it stands there.
        start: Character at which it begins.
        above_null: Its score, less that of "not in this document".
        windows: How many were read.
    """

    text: str
    start: int
    above_null: float
    windows: int


class _Asked:
    def __init__(self, job: Job) -> None:
        self.job = job
        question: Question = job.work
        self.example, self.left, self.count = question.example, deque(question.windows), len(question.windows)
        self.best = (-math.inf, 0, 0)


class Answerer:
    """Takes windows from the running questions in turn, so that a short document does not wait for a long one.

    Args:
        module: A trained model.
        pad_token_id: Fills up shorter windows.
        capacity: Windows of a batch, and questions at a time.
    """

    def __init__(self, module: SpanQA, pad_token_id: int, capacity: int) -> None:
        self.capacity = self.at_once = capacity
        self._module, self._collate = module, Collate(pad_token_id)
        self._asked: dict[Job, _Asked] = {}
        assert module.model is not None
        self._device = module.model.device

    @property
    def running(self) -> Sequence[Job]:
        """See :class:`astbench.serving.engine.Worker`."""
        return list(self._asked)

    def admit(self, job: Job) -> None:
        """Let it take part in the next batch."""
        self._asked[job] = _Asked(job)

    def drop(self, job: Job) -> None:
        """See :class:`astbench.serving.engine.Worker`."""
        self._asked.pop(job, None)

    @torch.inference_mode()
    def step(self) -> None:
        """Read one batch of windows."""
        turns = self._turns()
        batch = self._collate([{"index": row, "window": window} for row, (_, window) in enumerate(turns)])
        batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
        start, end = self._module(batch)
        finite = ~(start.isnan().any(1) | end.isnan().any(1))
        longest = self._module.config.max_answer_tokens
        values, firsts, lasts = best_spans(start, end, batch["answerable"], longest)
        row = torch.arange(len(turns), device=self._device)
        begins, stops = batch["offsets"][row, firsts, 0].tolist(), batch["offsets"][row, lasts, 1].tolist()
        for (asked, _), value, begin, stop, good in zip(
            turns, values.tolist(), begins, stops, finite.tolist(), strict=True
        ):
            if not good:
                self.drop(asked.job)
                asked.job.emit(NotFinite())
            elif value > asked.best[0]:
                asked.best = (value, begin, stop)
        for asked in [a for a in self._asked.values() if not a.left]:
            self.drop(asked.job)
            value, begin, stop = asked.best
            asked.job.emit(Done(Answer(asked.example.context[begin:stop], begin, value, asked.count)))

    def _turns(self) -> list[tuple[_Asked, Window]]:
        """Up to `capacity` windows, one of each question at a time."""
        taken: list[tuple[_Asked, Window]] = []
        while len(taken) < self.capacity and any(asked.left for asked in self._asked.values()):
            with_some = [asked for asked in self._asked.values() if asked.left]
            taken += [(asked, asked.left.popleft()) for asked in with_some[: self.capacity - len(taken)]]
        # The next batch begins with those that were served least lately.
        for asked, _ in taken:
            if asked.job in self._asked:
                self._asked[asked.job] = self._asked.pop(asked.job)
        return taken
