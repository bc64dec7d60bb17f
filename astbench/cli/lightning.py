"""Second phase of the command line: one LightningCLI parser for the chosen attention and task."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from astbench import console
from astbench.backbones.adapters import adapter_folder
from astbench.backbones.presets import BackboneConfig
from astbench.cli.analysing import Analysing
from astbench.cli.command_line import CommandLine
from astbench.cli.config_files import CODE
from astbench.cli.depths import DepthCallback, check_trained_depth
from astbench.cli.option_checks import (
    check_options,
    depth_options,
    group_options,
    refuse_code,
    refuse_functions,
    without_name,
)
from astbench.cli.parser import ALLOWED, Parser
from astbench.cli.plain_options import as_yaml, plain_options
from astbench.cli.processes import leading
from astbench.cli.quiet import quiet_libraries
from astbench.cli.run_callback import RunCallback
from astbench.cli.second_phase import parser_arguments
from astbench.cli.stopping import SIGNALS
from astbench.cli.transformed import TransformCallback
from astbench.errors import AstbenchError, CheckpointError, ConfigError, refused_by_system
from astbench.files.writing import write_text
from astbench.runs.checkpoint_checks import check_content
from astbench.runs.checkpoints import SafeCheckpointIO, read_checkpoint
from astbench.runs.folder import CONFIG, RunFolder, checkpoint_file, doubts
from astbench.runs.progress import build_loggers, progress_bar
from astbench.runs.run_record import config_doubts
from astbench.tasks import Task, find_task
from astbench.training.optim import OptimConfig
from astbench.training.trainer import TRAINER_DEFAULTS
from astbench_registry.depth.registry import depth_config_class
from astbench_registry.registry import config_class, current_names
from astbench_registry.transforms.registry import transform_config_class

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]

_FREE = ("backend",)
"""Options that may differ between training and evaluation: they change the kernel, not the function."""


class CLI(LightningCLI):
    """Builds data, model and trainer from the options, and wraps the run in its folder and record."""

    def __init__(
        self, command: str, line: CommandLine, task: Task, arguments: list[str], analysing: Analysing | None = None
    ) -> None:
        self.command, self.line, self.task, self.analysing = command, line, task, analysing
        assert line.attention is not None
        self.attention = line.attention
        self.module_class, self.data_class, self.task_config = task.load()
        self.folder: RunFolder | None = None
        sys.argv[1:] = [command, *arguments]
        try:
            super().__init__(
                self.module_class,
                self.data_class,
                save_config_callback=None,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                parser_class=Parser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except BaseException:
            if self.folder is not None:
                self.folder.abandon()
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the parser in use is built."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Groups of our own; the model receives them as plain dictionaries."""
        parser.add_argument("--attention.name", type=str, default=self.attention, help="registered attention")
        parser.add_class_arguments(config_class(self.attention), "attention", instantiate=False)
        parser.add_argument(
            "--transform.name",
            type=str | None,
            default=self.line.transform,
            help="registered transform of attention weights (validate, test, predict)",
        )
        if self.line.transform is not None:
            parser.add_class_arguments(transform_config_class(self.line.transform), "transform", instantiate=False)
        parser.add_argument(
            "--depth.name", type=str | None, default=self.line.depth, help="registered policy that chooses the layers"
        )
        if self.line.depth is not None:
            parser.add_class_arguments(depth_config_class(self.line.depth), "depth", instantiate=False)
        parser.add_argument("--task.name", type=str, default=self.task.name, help="registered task")
        parser.add_class_arguments(self.task_config, "task", instantiate=False)
        parser.add_class_arguments(BackboneConfig, "backbone", instantiate=False)
        parser.add_class_arguments(OptimConfig, "optim", instantiate=False)
        parser.add_argument(
            "--trainer.threads",
            type=int | None,
            default=None,
            help="torch threads of each process, which sums on the CPU depend on; by default torch's own number, "
            "recorded as what it was",
        )
        parser.add_argument("--run_dir", type=str | None, default=None, help="folder of this run")
        parser.add_argument("--init_from", type=str | None, default=None, help="run or adapter to take weights from")
        parser.add_argument("--plugins", type=list[str], default=list(self.line.plugins), help="plugins to load")
        parser.add_argument("--checkpoint_every", type=int, default=100, help="optimizer steps between checkpoints")
        parser.add_argument(
            "--keep_every",
            type=int | None,
            default=None,
            help="optimizer steps between weights that are kept for good, as step-N.ckpt: each as large as the model",
        )
        parser.add_argument(
            "--loggers",
            type=LoggerName | list[LoggerName],
            default=["csv", "tensorboard"],
            help="where metrics go; --loggers+=wandb adds one",
        )
        for group in ("attention", "task", "backbone", "optim"):
            parser.link_arguments(
                group, f"model.{group}", compute_fn=without_name if group == "task" else group_options
            )
        parser.link_arguments("depth", "model.depth", compute_fn=depth_options)
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("init_from", "model.init_from")
        parser.set_defaults(self._demo_defaults(parser))

    def _demo_defaults(self, parser: LightningArgumentParser) -> dict[str, Any]:
        """Settings measured for the first source, where it is used and for options that exist here."""
        if not self.task.demo or self.line.value("data.source") not in (None, self.task.sources[0]):
            return {}
        known = {a.dest for a in parser._actions}
        return {key: value for key, value in self.task.demo.items() if key in known}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; refuse a seed that some generator would not take."""
        super().parse_arguments(parser, args)
        seed = self.options.seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ConfigError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the checkpoint here, unverified, and take options of the model from it."""

    def before_instantiate_classes(self) -> None:
        """Check what can be checked before anything is built or read."""
        sys.argv[1:] = [self.command, *self.line.typed]  # Lightning starts a run's other processes with these
        names = {kind: getattr(self.line, kind) for kind in CODE}
        for kind, known in names.items():
            if self.options[kind].name != known:  # only names that were looked at may be imported
                raise ConfigError(f"--{kind}={known} was chosen, and the options name {self.options[kind].name}")
        if not self.line.trust_config:
            refuse_functions(self.options.trainer)
            refuse_code(self.options, self.task, self.line.typed)
        check_options(self.command, self.options, self.task)
        self._set_threads()

    def _set_threads(self) -> None:
        """Take the number of threads from the options, or into them: sums on the CPU depend on it."""
        threads = self.options.trainer.threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.options.trainer.threads = torch.get_num_threads()

    @property
    def options(self) -> Namespace:
        """The parsed options of the subcommand."""
        return self.config[self.command]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our checkpoint files, callback, progress and loggers."""
        options = self.options
        SIGNALS.check()
        self._check_processes()
        self.folder = RunFolder(options.run_dir) if options.run_dir else self._new_folder()
        self.run_callback = RunCallback(
            self.folder, self.command, self.task, options.checkpoint_every, options.keep_every
        )
        trainer = self._get(self.config_init, "trainer").as_dict()
        self.transforming = (
            TransformCallback(self.line.transform, without_name(options.transform)) if self.line.transform else None
        )
        callbacks = [*(trainer.pop("callbacks", None) or []), self.run_callback, self.run_callback.counted]
        if self.transforming is not None:
            callbacks.insert(-2, self.transforming)  # the first lines tell of it
        self.depths = DepthCallback() if self.line.depth else None
        if self.depths is not None:
            callbacks.append(self.depths)
        if self.analysing is not None:
            callbacks.append(self.analysing)
        trainer["enable_progress_bar"] = trainer.get("enable_progress_bar") is not False
        if trainer["enable_progress_bar"]:
            callbacks.append(progress_bar())
        del trainer["threads"]  # ours, not Lightning's
        if 0 < (steps := self.options.trainer.max_steps) < trainer["log_every_n_steps"]:
            trainer["log_every_n_steps"] = steps  # else a short run would log no loss at all
        self.checkpoint_io = SafeCheckpointIO()
        plugins = [*(trainer.pop("plugins", None) or []), self.checkpoint_io]
        if trainer.get("logger") in (None, True) and self.command == "fit":
            names = [options.loggers] if isinstance(options.loggers, str) else options.loggers
            trainer["logger"] = build_loggers(names, self.folder, resume=self.line.resume is not None)
        elif trainer.get("logger") in (None, True):
            trainer["logger"] = False
        trainer["default_root_dir"] = str(self.folder.path)
        return Trainer(**trainer, callbacks=callbacks, plugins=plugins)

    def _check_processes(self) -> None:
        """A run's other processes read the configs again, which a pipe does not give twice."""
        pipes = [config.path for config in self.line.configs if not Path(config.path).is_file()]
        if pipes and str(self.options.trainer.devices) not in ("1", "auto"):
            raise ConfigError(
                f"--config={pipes[0]} is no file, and --trainer.devices={self.options.trainer.devices} reads it in "
                "every process; write it to a file"
            )

    def _new_folder(self) -> RunFolder:
        """A folder of its own, named on the command line that Lightning starts its other processes with."""
        if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
            raise ConfigError("processes started from outside must agree on a folder: name it with --run_dir=FOLDER")
        folder = RunFolder.claim(self.task.name, self.attention)
        sys.argv.append(f"--run_dir={folder.path}")
        return folder

    def _run_subcommand(self, subcommand: str) -> None:
        assert self.folder is not None
        SIGNALS.check()
        checkpoint = self._checkpoint()
        self._prepare_data(checkpoint)
        writer = self.trainer.is_global_zero
        if writer:
            self.folder.open_for_writing(resume=self.line.resume is not None)
        with closing(self.folder):
            if writer and self.line.resume is None:
                self._save_config()
            self.run_callback.begin(plain_options(self.options), self.line.typed, checkpoint, writer=writer)
            run: Callable[..., Any] = getattr(self.trainer, subcommand)
            with self.run_callback.recording():
                quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
                try:
                    run(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True, **quiet)
                    if subcommand == "fit":
                        self.run_callback.evaluate(self.trainer, self.model, self.datamodule)
                    if self.analysing is not None:
                        self.run_callback.record.data.update(self.analysing.finish(self.model, self.folder))
                    if self.transforming is not None:
                        self.run_callback.record.data.update(self.transforming.record(self.model))
                    if self.depths is not None:
                        self.run_callback.record.data.update(self.depths.record(self.model, self.folder))
                    self.run_callback.finish(self.model)
                except (SystemExit, Exception) as error:
                    # Lightning makes exits of signals, and torch errors of workers that died of one.
                    if SIGNALS.number is not None and not isinstance(error, AstbenchError):
                        raise self.run_callback.stopped_at_once() from error
                    if isinstance(error, SystemExit):
                        raise AstbenchError(f"the run was ended from within by exit({error.code})") from error
                    self._explain_restoring(error)
                    raise

    def _explain_restoring(self, error: Exception) -> None:
        """Whatever Lightning and torch raise between reading a checkpoint and going on from it is about the file.

        Raises:
            CheckpointError: such an error.
        """
        file = self.checkpoint_io.reads
        if (
            file
            and not self.run_callback.goes
            and not isinstance(error, AstbenchError)
            and not refused_by_system(error)
        ):
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint {file} cannot be restored: {type(error).__name__}: {reason}") from error

    def _checkpoint(self) -> str | None:
        """The checkpoint to load, verified; refuse one of other options.

        Where there is one, nothing is taken from the run that this one began with.
        """
        options, resume = self.options, self.line.resume
        if resume:
            self._note(config_doubts(RunFolder(resume)))
            if RunFolder(resume).newest_checkpoint() is None:
                console.say(f"{resume} was stopped before its first checkpoint: starting again")
                resume = None
        asked = resume or options.get("ckpt_path")
        if not asked:
            if options.init_from and adapter_folder(options.init_from) is None:
                self._found(options.init_from)
            return None
        file = self._found(asked)
        self._check_trained(file, check_content(read_checkpoint(file), file, resume=bool(resume)))
        self.model.init_from = None
        return str(file)

    def _found(self, asked: str) -> Path:
        """The checkpoint of a run, with a note on what is not as it should be."""
        file = checkpoint_file(asked)
        self._note(doubts(asked, file))
        RunFolder(file.parent).check_tokenizer()
        return file

    def _note(self, text: str) -> None:
        if text and self.trainer.is_global_zero:
            console.say(f"note: {text}")

    def _check_trained(self, file: Path, checkpoint: dict[str, Any]) -> None:
        options, trained = self.options, checkpoint["hyper_parameters"]
        trained = {**trained, "attention": current_names(trained["attention"])}
        fixed = {k: (trained["task"] or {}).get(k) for k in self.module_class.fixed_task_options}
        check_trained_depth(file, trained.get("depth"), depth_options(options.depth))
        for group in ("attention", "backbone", "task"):
            now = group_options(options[group])
            before = fixed if group == "task" else {k: v for k, v in trained[group].items() if k not in _FREE}
            differs = {k: (v, now.get(k)) for k, v in before.items() if now.get(k) != v}
            if differs:
                raise CheckpointError(
                    f"{file} was trained with other {group} options (checkpoint, given): {differs}; to run its "
                    "weights with another attention use --init_from"
                )

    def _prepare_data(self, checkpoint: str | None) -> None:
        options = self.options
        folder = None
        source = checkpoint or options.init_from
        if source and (checkpoint or adapter_folder(source) is None):  # an adapter's tokenizer is the backbone's
            path = Path(source)
            folder = path if path.is_dir() else path.parent
        self.datamodule.prepare(BackboneConfig(**vars(options.backbone)), options.seed_everything, folder)

    def _save_config(self) -> None:
        assert self.folder is not None
        config = self.options.clone()
        for key in ("config", "run_dir", "weights_only", "verbose"):
            config.pop(key, None)
        for group in ("transform", "depth"):
            if config[group].name is None:
                config.pop(group)
        text = self._parser(self.command).dump(as_yaml(config), skip_unset=False, skip_validation=True)
        head = f"# astbench {self.command} --config={CONFIG} runs this again.\n"
        write_text(self.folder / CONFIG, head + text)


def run(command: str, line: CommandLine, analysing: Analysing | None = None) -> int:
    """Parse, build and run; returns the exit code.

    Args:
        command: fit, validate, test or predict.
        line: What was asked for.
        analysing: Looks at what was attended to, after the evaluation.

    Raises:
        AstbenchError: what was asked for cannot be, or went wrong.
    """
    SIGNALS.check()
    quiet_libraries()
    if not line.trust_config:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED)
    assert line.task is not None
    task = find_task(line.task)
    if command not in task.commands:
        raise ConfigError(f"task {task.name} has only `astbench {'|'.join(task.commands)}` so far, not {command}")
    if line.resume and command != "fit":
        raise ConfigError(f"--resume goes with fit; {command} takes --ckpt_path={line.resume}")
    if line.resume and RunFolder(line.resume).done:
        console.say(f"{line.resume} is done already; nothing to resume")
        return 0
    with leading(), tempfile.TemporaryDirectory(prefix="astbench-") as folder:
        try:
            CLI(command, line, task, parser_arguments(line, Path(folder)), analysing)
        except MisconfigurationException as error:
            raise ConfigError(str(error)) from error
    return 0
