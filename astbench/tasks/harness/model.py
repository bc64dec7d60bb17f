"""A swapped model as lm-eval's own class for Hugging Face models takes it, one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.tasks.harness.prompts import Seen


class SwappedLM(HFLM):
    """lm-eval's `HFLM` around a model that is there already; tokens, stopping and scoring are all lm-eval's.

    Sequences are never batched: `HFLM` pads inputs that are scored without a mask, which an attention that counts the
    keys of a row would take for text.

    Args:
        model: With its attention swapped.
        tokenizer: Its own.
        max_length: Most tokens of an input and what is written behind it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__(model, backend="causal", tokenizer=tokenizer, max_length=max_length, batch_size=1)
        self.seen = Seen(tokenizer.bos_token_id)

    @property
    def device(self) -> torch.device:
        """Where the model is now, which may have been moved."""
        return self.model.device

    def most_written(self, options: dict[str, Any]) -> int:
        """Tokens that a request to generate may write."""
        return int(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"])

    def encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what is scored behind it; an empty context is a start token."""
        if context:
            before, after = self._encode_pair(context, continuation)
            return before, after
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return ([self.prefix_token_id], ids) if ids[:1] != [self.prefix_token_id] else (ids[:1], ids[1:])

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=1)

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.seen.add(inps[0].tolist())
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.seen.add(context[0].tolist())
        return super()._model_generate(context, *arguments, **options)
