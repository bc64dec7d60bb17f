"""Any task of EleutherAI's lm-eval, asked of a causal language model with a swapped attention."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from astbench.errors import ConfigError
from astbench.tasks.harness.catalogue import quiet
from astbench.tasks.harness.data import HarnessData
from astbench.tasks.harness.prompts import audit, build, check_lengths, notes, too_short
from astbench.tasks.harness.scores import items_of, metrics_of
from astbench.training.module import TaskModule
from astbench_registry.registry import make_config


class Harness(TaskModule):
    """Prompts, stopping, scoring and aggregation are lm-eval's; the model, its attention and the record are ours.

    The prompts are made once before anything is computed, to be measured and looked at, and once more by lm-eval.
    """

    head = "causal_lm"

    def __init__(self, attention: dict[str, Any], task: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(attention, task=task, **common)
        self.can = make_config(attention["name"], {k: v for k, v in attention.items() if k != "name"}).can
        self.results: dict[str, Any] = {}
        self.lm: Any = None

    @property
    def data(self) -> HarnessData:
        """The data module in use."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Make the prompts; refuse a model that cannot write, and prompts that it cannot take.

        Raises:
            ConfigError: an encoder, prompts that are too long, or several processes.
            CapabilityError: an attention that cannot decode, where something is to be written.
        """
        if self.model is not None:
            return
        if self.trainer.world_size > 1:
            raise ConfigError("--task=lm_eval runs in one process; give it --trainer.devices=1")
        super().configure_model()
        assert self.model is not None
        self._check_writes()
        from astbench.tasks.harness.model import SwappedLM

        data = self.data
        self.lm = SwappedLM(self.model, data.tokenizer, data.max_length)
        template = self.lm.apply_chat_template if data.chat_template else None
        with quiet():
            data.prompts = build(self.lm, data.loaded["tasks"], data.fewshot_seed, **data.how, chat_template=template)
        check_lengths(data.prompts, data.max_length, data.too_long)
        if any(prompt.writes for prompt in data.prompts):
            self.can.check(self.attention["name"], "causal_self", decode=True)
        data.audit = audit(self.lm, data.tokenizer, data.prompts, template=data.chat_template, system=data.system)
        data.notes += [*notes(data.audit), *too_short(data.prompts)]
        if not self.can.strictly_causal and not all(prompt.writes for prompt in data.prompts):
            data.notes.append(
                f"{self.attention['name']} chooses a token's keys with later tokens in sight: scores of given texts "
                "flatter it"
            )

    def _check_writes(self) -> None:
        """Refuse an encoder, or the decoder of a pair: transformers would put an untrained head on it.

        Raises:
            ConfigError: naming what it is.
        """
        assert self.model is not None
        built = next(iter(self.model.config.architectures or []), None)
        patterns = {slot.pattern for slot in self.swapped.slots}
        if built not in (None, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) or patterns != {"causal_self"}:
            raise ConfigError(
                f"--task=lm_eval needs a causal language model; --backbone.name={self.backbone.name} is "
                f"{built or 'an encoder'}"
            )

    def forward(self, batch: Any) -> Tensor:
        """Logits of the first prompt, `(1, tokens, vocabulary)`: for the picture of what was attended to."""
        assert self.model is not None
        prompt = self.data.prompts[0]
        ids = torch.tensor([prompt.ids[prompt.cut :]], device=self.model.device)
        logits: Tensor = self.model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Let lm-eval ask everything."""
        from lm_eval.evaluator import evaluate

        data = self.data
        for task in data.loaded["tasks"].values():
            task.set_fewshot_seed(data.fewshot_seed)
        torch.manual_seed(data.fewshot_seed)  # for tasks that sample what is written
        found: Any = evaluate(self.lm, data.loaded, bootstrap_iters=0, log_samples=True, **data.how)
        items = items_of(found, data.prompts)
        names = ", ".join(f"{name} (version {row['version']})" for name, row in data.describe()["tasks"].items())
        template = "chat template" if data.chat_template else "no chat template"
        self.results = {
            "metrics": metrics_of(found, items),
            "signature": f"lm-eval {version('lm_eval')}: {names}; {len(items)} items, "
            f"at most {data.max_length} tokens, {template}, {self._shots(found)}, seed {self.seed}",
            "split": "test",
            "strictly_causal": self.can.strictly_causal,
            "audit": {**data.audit, "model_got": self.lm.seen.described()},
            "items": items,
        }

    def _shots(self, found: dict[str, Any]) -> str:
        counts = sorted(set(found["n-shot"].values()))
        return f"{' or '.join(map(str, counts))} solved examples"
