"""The model that a run trained, built again from its checkpoint alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.load import load_backbone
from astbench.backbones.swap import swap_attention
from astbench.backbones.tokenizers import saved_tokenizer
from astbench.errors import ConfigError
from astbench.runs.checkpoint_checks import check_content, check_weights
from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import RunFolder
from astbench.tasks.table import Task
from astbench.training.averaging import final_weights
from astbench.training.module import TaskModule
from astbench_registry.registry import current_names


@dataclass(frozen=True)
class Trained:
    """A run's model with its attention swapped in, before and after its weights are loaded.

    Attributes:
        module: The task's module with its model.
        tokenizer: The run's.
        weights: What the run was evaluated with, as :meth:`load` takes them.
        file: Where they came from.
    """

    module: TaskModule
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]
    file: Path

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model."""
        assert self.module.model is not None
        return self.module.model

    def load(self) -> None:
        """Give the model its weights.

        Raises:
            CheckpointError: one is missing, unknown, or of another shape.
        """
        check_weights(self.weights, self.module.state_dict(), str(self.file))
        self.module.load_state_dict(self.weights)


def rebuild(file: Path, task: Task) -> Trained:
    """Build the model of a run as the run did, without its weights.

    Args:
        file: The checkpoint, in the folder of the run.
        task: What the run was trained on.

    Raises:
        ConfigError: it chose its depth by input.
        CheckpointError: missing, damaged, or not what its configuration says.
        DataError: the run's backbone or tokenizer is not there any more.
    """
    RunFolder(file.parent).check_tokenizer()
    checkpoint = check_content(read_checkpoint(file), file)
    options = checkpoint["hyper_parameters"]
    if depth := options.get("depth"):
        raise ConfigError(f"{file.parent} was trained with --depth={depth['name']}: it cannot be served or pushed")
    attention = current_names(options["attention"])
    module = task.load()[0](**{**options, "attention": attention, "init_from": None})
    tokenizer = saved_tokenizer(file.parent)
    equip(module, load_backbone(module.backbone, module.head, tokenizer=tokenizer))
    return Trained(module, tokenizer, final_weights(checkpoint), file)


def equip(module: TaskModule, model: PreTrainedModel) -> None:
    """Give a task's module its model, with the attention swapped in as `configure_model` does."""
    options = {key: value for key, value in module.attention.items() if key != "name"}
    torch.manual_seed(module.seed + 1)
    module.model = model
    module.handle = swap_attention(model, module.attention["name"], options, where=module.where)
