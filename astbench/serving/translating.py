"""Sentences translated together, by the beam search that `astbench predict` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from astbench.serving.engine import Done, Job, NotFinite
from astbench.tasks.mt.task import Translation


@dataclass(frozen=True)
class Sentence:
    """What a job of the translator is to do.

    Attributes:
        tokens: Of the sentence, its end included.
    """

    tokens: Sequence[int]


class Translator:
    """Whatever has come is translated in one search; what comes meanwhile, in the next.

    Ends with :class:`Done` of the translation's token ids.

    Args:
        module: A trained model.
        pad_token_id: Fills up shorter sentences.
        longest: Most tokens of a translation.
        capacity: Sentences of a search.
    """

    def __init__(self, module: Translation, pad_token_id: int, longest: int, capacity: int) -> None:
        self.capacity = self.at_once = capacity
        self._module, self._pad, self._longest = module, pad_token_id, longest
        self._jobs: dict[Job, None] = {}
        assert module.model is not None
        self._device = module.model.device

    @property
    def running(self) -> Sequence[Job]:
        """See :class:`astbench.serving.engine.Worker`."""
        return list(self._jobs)

    def admit(self, job: Job) -> None:
        """Let it take part in the next search."""
        self._jobs[job] = None

    def drop(self, job: Job) -> None:
        """See :class:`astbench.serving.engine.Worker`."""
        self._jobs.pop(job, None)

    @torch.inference_mode()
    def step(self) -> None:
        """One search."""
        jobs = list(self._jobs)
        try:
            self._search(jobs)
        except NotFinite:
            for job in jobs if len(jobs) > 1 else ():  # which of them it is shows when each is alone
                try:
                    self._search([job])
                except NotFinite as error:
                    self.drop(job)
                    job.emit(error)
            if len(jobs) == 1:
                raise

    def _search(self, jobs: Sequence[Job]) -> None:
        sentences = [torch.tensor(list(job.work.tokens)) for job in jobs]
        ids = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=self._pad)
        lengths = torch.tensor([len(x) for x in sentences])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        found = self._module.search(
            ids.to(self._device),
            real.to(self._device),
            self._longest,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([_AllGone(jobs)]),
        )
        for job, tokens in zip(jobs, found.tolist(), strict=True):
            self.drop(job)
            job.emit(Done(tokens))


class _Finite(LogitsProcessor):
    """Beam search would go on with scores that are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise NotFinite
        return scores


class _AllGone(StoppingCriteria):
    """Nobody waits for any of these sentences."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        gone = all(job.cancelled for job in self._jobs)
        return torch.full((len(input_ids),), gone, dtype=torch.bool, device=input_ids.device)
