"""The run that is shared: its record, and the model with the weights it was evaluated with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astbench.backbones.presets import BackboneConfig, Head, resolve_preset
from astbench.backbones.swap import SwapHandle
from astbench.errors import ConfigError, DataError
from astbench.files.paths import other_kind
from astbench.runs.folder import RECORD, checkpoint_file
from astbench.tables.integrity import check_options
from astbench.tables.records import Entry, Run, read_record
from astbench.tasks import find_task
from astbench.tasks.trained import rebuild


@dataclass(frozen=True)
class Source:
    """A finished training run, and what it trained.

    Attributes:
        run: Its record.
        head: What stands on the backbone.
        backbone: What it was trained from.
        model: With its attention swapped, and the final weights.
        handle: Of that attention.
        tokenizer: The run's.
        base: Name on the hub, or a preset's, of what it was trained from; empty for a folder.
    """

    run: Run
    head: Head
    backbone: BackboneConfig
    model: PreTrainedModel
    handle: SwapHandle
    tokenizer: PreTrainedTokenizerBase
    base: str

    @property
    def from_scratch(self) -> bool:
        """The backbone is a preset, whose weights the run has drawn itself."""
        return resolve_preset(self.backbone.name, self.head) is not None

    @property
    def frozen(self) -> bool:
        """The run trained the attention's own weights and nothing else."""
        return bool(self.run.record["config"]["optim"]["train"] == "attention")


def finished_run(folder: Path) -> Run:
    """The record of a training run that ended well.

    Raises:
        DataError: no record, or one that was edited.
        ConfigError: of another command, of one that did not end well, or of an attention that a plugin brought.
    """
    file = folder / RECORD
    if not file.is_file():
        raise DataError(f"{folder} is not the folder of a run: it holds no {RECORD}{other_kind(folder)}")
    record = read_record(file)
    check_options(file, record)
    if record["command"] != "fit" or record["state"] != "done":
        raise ConfigError(
            f"{folder} is a {record['command']} that ended as {record['state']}; a training run that is done has "
            "weights to push"
        )
    if record.get("plugins"):
        raise ConfigError(
            f"{folder} used {record['plugins'][0]['plugin']}, which is not astbench's: who loads the weights would "
            "lack it"
        )
    return Run("runs", folder.resolve().name, folder, record, Entry(record["config_hash"]))


def read_source(folder: Path, base: str) -> Source:
    """The model of a run, from its verified checkpoint.

    Args:
        folder: Of the run.
        base: What the backbone is called on the hub; empty for what the run was told.

    Raises:
        ConfigError: as :func:`finished_run`; or a task that puts layers of its own on the model.
        DataError: as :func:`finished_run`; or a backbone or tokenizer that is not there any more.
        CheckpointError: missing or damaged.
    """
    run = finished_run(folder)
    task = find_task(run.record["config"]["task"]["name"])
    if not task.load()[1].tokenized:
        raise ConfigError(
            f"task {task.name} trains a model that transformers knows only beside astbench: its runs cannot be pushed"
        )
    trained = rebuild(checkpoint_file(folder), task)
    module, model = trained.module, trained.model
    if extra := sorted(set(trained.weights) - {f"model.{name}" for name in model.state_dict()}):
        raise ConfigError(
            f"task {task.name} puts layers of its own on the model ({extra[0]}), which from_pretrained would drop: its "
            "runs cannot be pushed"
        )
    trained.load()
    name = module.backbone.name
    known = base or ("" if Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) else name)
    return Source(run, module.head, module.backbone, model.eval(), module.swapped, trained.tokenizer, known)


def check_adapter(source: Source) -> None:
    """Refuse to leave the backbone out where the run has changed it.

    Raises:
        ConfigError: it was trained too or has no name, or the attention has no weights of its own.
    """
    name = source.handle.name
    if not source.handle.state_dict():
        raise ConfigError(f"attention {name} has no weights of its own, so no adapter either; leave --adapter out")
    if source.from_scratch:
        raise ConfigError(
            f"the run trained the preset {source.backbone.name} from scratch, and an adapter would leave that out; "
            "leave --adapter out"
        )
    if not source.frozen:
        raise ConfigError(
            "the run trained its backbone too (--optim.train=all), and an adapter would leave that out; leave "
            "--adapter out"
        )
    if not source.base:
        raise ConfigError("an adapter needs its backbone, which the run took from a folder; name it: --base=OWNER/NAME")
