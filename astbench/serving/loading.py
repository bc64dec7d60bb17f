"""From a run, an adapter or a pretrained folder to a model that can be served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from astbench.backbones.adapters import DESCRIPTION, load_adapter
from astbench.backbones.hooks import IMPLEMENTATION
from astbench.backbones.load import load_backbone, max_positions
from astbench.backbones.presets import BackboneConfig, Head
from astbench.backbones.swap import SwapHandle
from astbench.backbones.tokenizers import load_tokenizer
from astbench.errors import ConfigError, DataError
from astbench.files.reading import read_by_library
from astbench.runs.folder import checkpoint_file, doubts
from astbench.tasks import find_task
from astbench.tasks.lm.task import LanguageModel
from astbench.tasks.mt.task import Translation
from astbench.tasks.qa.task import SpanQA
from astbench.tasks.trained import equip, rebuild
from astbench.training.module import TaskModule
from astbench_registry import CapabilityError
from astbench_registry.registry import make_config

UNLIMITED = 8192
"""Most tokens where a model has no last position and `--max_length` says nothing."""

_HEADS: dict[Head, Mapping[str, Any]] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "question_answering": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_MODULES: dict[Head, type[TaskModule]] = {
    "causal_lm": LanguageModel,
    "seq2seq": Translation,
    "question_answering": SpanQA,
}


@dataclass
class Served:
    """A model, ready to answer.

    Attributes:
        name: What requests may call it.
        module: The task's module with its model; what answers and translates.
        tokenizer: The model's.
        limit: Tokens that it has positions for.
        data: Options of the data it was trained on, such as the length of its windows.
        notes: What a user should know.
    """

    name: str
    module: TaskModule
    tokenizer: PreTrainedTokenizerBase
    limit: int
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def head(self) -> Head:
        """What the model does."""
        return self.module.head

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model."""
        assert self.module.model is not None
        return self.module.model

    @property
    def handle(self) -> SwapHandle:
        """The swapped attention."""
        return self.module.swapped

    def place(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Put it on a device, its weights in a dtype.

        What is no weight stays as it is: rotary frequencies in bfloat16 would turn far tokens by other angles.
        """
        self.module.to(device)
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(dtype)


def load_run(asked: str, config: Mapping[str, Any]) -> Served:
    """The model of a run of `astbench fit`.

    Args:
        asked: Run folder or checkpoint.
        config: The run's `config.yaml`.

    Raises:
        CheckpointError: missing, damaged, or not what its configuration says.
        ConfigError: a task whose model cannot be served.
    """
    file = checkpoint_file(asked)
    notes = [doubts(asked, file)]
    task = find_task(str((config.get("task") or {}).get("name")))
    if task.load()[0].head not in _HEADS:
        raise ConfigError(f"{asked} was trained on {task.name}; served are models that write, translate or answer")
    trained = rebuild(file, task)
    trained.load()
    precision = str((config.get("trainer") or {}).get("precision") or "32-true")
    if precision not in ("32-true", "32", "float32"):
        notes.append(f"trained with --trainer.precision={precision}, served in float32")
    return _served(asked, trained.module, trained.tokenizer, config.get("data") or {}, notes)


def load_pretrained(asked: str, attention: str | None, options: Mapping[str, Any]) -> Served:
    """A folder of Hugging Face's, with an attention swapped in.

    Args:
        asked: The folder, with `config.json` or one GGUF file.
        attention: What is swapped in; None for what the folder was saved with, else dense.
        options: Of the attention.

    Raises:
        ConfigError: a model that does none of what is served.
        CapabilityError: the attention cannot serve it.
    """
    backbone = BackboneConfig(name=asked)
    config = _config(asked)
    said = config.get(IMPLEMENTATION)
    if attention is None and isinstance(said, dict):
        attention, options = str(said.get("attention")), dict(said.get("options") or {})
    head = _head(asked, config)
    module = _MODULES[head](attention={"name": attention or "dense", **options}, backbone={"name": asked})
    equip(module, load_backbone(backbone, head))
    return _served(asked, module, load_tokenizer(backbone, offsets=head != "seq2seq"), {}, [])


def load_adapted(asked: str, backbone: str | None) -> Served:
    """The attention of an adapter in the backbone that it was made for.

    Args:
        asked: The adapter's folder.
        backbone: Folder of the backbone; None for what the adapter names.

    Raises:
        CheckpointError: the adapter is damaged, or does not fit.
        ConfigError: the backbone is not there, or does none of what is served.
    """
    described = _json(Path(asked) / DESCRIPTION)
    name = backbone or str(described.get("backbone"))
    if not Path(name).expanduser().is_dir():
        raise ConfigError(
            f"the adapter in {asked} is for the backbone {name}, no folder; name it with --backbone=FOLDER"
        )
    head = _head(name, _config(name))
    module = _MODULES[head](attention={"name": described.get("attention")}, backbone={"name": name})
    module.model = load_backbone(BackboneConfig(name=name), head)
    module.handle = load_adapter(module.model, asked)
    module.attention = {"name": module.handle.name, **module.handle.options}
    return _served(asked, module, load_tokenizer(BackboneConfig(name=name), offsets=head != "seq2seq"), {}, [])


def _served(
    asked: str, module: TaskModule, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any], notes: list[str]
) -> Served:
    module.eval().requires_grad_(False)
    assert module.model is not None
    name = module.attention["name"]
    can = make_config(name, {k: v for k, v in module.attention.items() if k != "name"}).can
    if module.head == "causal_lm" and not can.decode:
        raise CapabilityError(
            f"attention '{name}' cannot decode: a step with a KV cache is not what one full pass gives; not served"
        )
    limit = max_positions(module.model)
    if limit >= 2**31:
        limit = UNLIMITED
        notes.append(f"the model has no last position: at most {UNLIMITED} tokens; --max_length says otherwise")
    notes = [note for note in [*notes, *module.swapped.notes] if note]
    return Served(Path(asked).resolve().name, module, tokenizer, limit, data, notes)


def _config(folder: str) -> dict[str, Any]:
    file = Path(folder).expanduser() / "config.json"
    return _json(file) if file.is_file() else {}  # a GGUF file holds its own


def _json(file: Path) -> dict[str, Any]:
    with read_by_library(f"{file} cannot be read"):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DataError(f"{file} cannot be read: it is no table")
    return found


def _head(folder: str, config: Mapping[str, Any]) -> Head:
    """What a pretrained model does, by the class that it was saved from."""
    names = config.get("architectures") or ()
    if not config:
        return "causal_lm"  # GGUF files hold such models
    for head, table in _HEADS.items():
        if any(name in _flat(table) for name in names):
            return head
    raise ConfigError(
        f"{folder} holds {', '.join(map(str, names)) or 'a model that does not say what it does'}; served are models "
        "for causal language modelling, question answering and sequence-to-sequence"
    )


def _flat(table: Mapping[str, Any]) -> set[str]:
    return {name for value in table.values() for name in ([value] if isinstance(value, str) else value)}


def is_run(path: str) -> bool:
    """A run's folder, or a file, which can only be a checkpoint."""
    return not Path(path).is_dir() or (Path(path) / "config.yaml").is_file()


def is_adapter(path: str) -> bool:
    """The folder of an adapter."""
    return (Path(path) / DESCRIPTION).is_file()
