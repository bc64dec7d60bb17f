"""What can be refused of parsed options before anything is built or read."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from jsonargparse import Namespace

from astbench import console
from astbench.backbones.adapters import adapter_folder
from astbench.backbones.presets import BackboneConfig, resolve_preset
from astbench.cli.bounds import check_attention_sizes, check_data_sizes, check_numbers
from astbench.errors import ConfigError, MissingPackageError
from astbench.tasks import Task
from astbench.training.optim import OptimConfig
from astbench_registry import AttentionConfig
from astbench_registry.depth.registry import make_depth_config
from astbench_registry.registry import make_config
from astbench_registry.transforms.registry import make_transform_config, require_probabilities

_CUT_SHORT = {
    "limit_train_batches": "--data.max_train=N",
    "limit_val_batches": "--data.max_eval=N",
    "limit_test_batches": "--data.max_eval=N",
    "limit_predict_batches": "a shorter input",
    "overfit_batches": "--data.max_train=N",
    "fast_dev_run": "--trainer.max_steps=3 --data.max_eval=8",
}
"""Trainer options that skip samples behind the data module's back, and what says the same openly."""


MOST_THREADS = 1024
"""A larger number of torch threads is a mistake, and would end the process."""


def group_options(group: Any) -> dict[str, Any]:
    """A parsed group as a dictionary."""
    return dict(vars(group)) if isinstance(group, Namespace) else dict(asdict(group))


def without_name(group: Any) -> dict[str, Any]:
    """A parsed group's options without the `name` that chose them."""
    return {k: v for k, v in group_options(group).items() if k != "name"}


def depth_options(group: Any) -> dict[str, Any] | None:
    """The depth policy's options with its name; None where every layer runs."""
    options = group_options(group)
    return options if options.get("name") is not None else None


def refuse_functions(value: Any, where: str = "trainer") -> None:
    """Refuse what a config would have called: it may name classes of those allowed, and nothing that they call.

    Raises:
        ConfigError: a function, under `class_path` or as an argument.
    """
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        named = value.get("class_path")
        if isinstance(named, str) and not inspect.isclass(pydoc.locate(named)):
            raise ConfigError(f"--{where} names {named}, which is no class; --trust_config lifts this")
        for key, part in value.items():
            refuse_functions(part, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for part in value:
            refuse_functions(part, where)
    elif callable(value):
        name = getattr(value, "__qualname__", type(value).__name__)
        raise ConfigError(
            f"--{where} names the function {name}: a config may name classes, and nothing else that is called; "
            "--trust_config lifts this for configs you trust"
        )


def refuse_code(options: Namespace, task: Task, words: Sequence[str]) -> None:
    """Refuse options of the data that name code, where a file and not the command line says so.

    Args:
        options: Parsed.
        task: Whose data module says which options do.
        words: The command line as it was typed.

    Raises:
        ConfigError: naming the option.
    """
    for name in getattr(task.load()[1], "code_options", ()):
        value, option = options.data[name], f"--data.{name}"
        typed = [after for word, after in pairwise([*words, ""]) if word == option]
        typed += [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
        if value and value not in typed:
            raise ConfigError(
                f"a config says {option}={value}, and what lies there is code: type the option to run it, or "
                "--trust_config to run whatever the config names"
            )


def check_options(command: str, options: Namespace, task: Task) -> None:
    """Refuse values and combinations that cannot work.

    Raises:
        ConfigError: an option, or a combination.
        ValueError: an option of the attention.
        CapabilityError: the attention cannot do what the task asks of it.
        MissingPackageError: an accelerator that is not there.
    """
    _, data_class, task_config = task.load()
    check_data_sizes(vars(options.data))
    longest, flag = data_class.longest(options.data, options.backbone)
    check_attention_sizes(without_name(options.attention), longest or 0)
    config = make_config(options.attention.name, without_name(options.attention))
    chosen = task_config(**without_name(options.task))
    _check_attention(command, options, task, config, chosen, {"length": longest, "length_flag": flag})
    if options.transform.name is not None:
        _check_transform(command, options, config)
    if options.depth.name is not None:
        _check_depth(command, options, task)
    elif options.optim.train == "depth":
        raise ConfigError("--optim.train=depth needs a depth policy that learns: --depth=transformer_inverse")
    BackboneConfig(**vars(options.backbone))
    OptimConfig(**vars(options.optim))
    check_numbers(options.as_dict(), "--")
    if options.keep_every is not None and options.keep_every < 1:
        raise ConfigError(f"--keep_every must be at least 1 step, got {options.keep_every}")
    if options.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint_every must be at least 1 step, got {options.checkpoint_every}")
    if command == "fit" and options.trainer.max_steps < 1:
        raise ConfigError("--trainer.max_steps must be at least 1: schedules and resuming count in steps")
    if command == "fit" and options.get("ckpt_path"):
        raise ConfigError("fit goes on with --resume=RUN, or starts from trained weights with --init_from=RUN")
    _check_trainer(options.trainer, task)
    _check_trained(command, options, task)
    if options.trainer.accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise MissingPackageError(
            f"--trainer.accelerator={options.trainer.accelerator}: torch sees no GPU here (astbench doctor says "
            "what it sees); leave the option out to run on the CPU"
        )


def _check_attention(
    command: str, options: Namespace, task: Task, config: AttentionConfig, chosen: Any, length: dict[str, Any]
) -> None:
    """Refuse an attention that cannot do what the task asks of it, and say where it could be used."""
    name = options.attention.name
    module_class, data_class, _ = task.load()
    layer = {**length, "padded": data_class.pads, **module_class.needs(command, options.data)}
    wanted = module_class.patterns(chosen)
    able = [place for place, pattern in wanted.items() if pattern in config.can.patterns]
    if 0 < len(able) < len(wanted):
        lacking = ", ".join(place for place in wanted if place not in able)
        raise ConfigError(
            f"attention '{name}' cannot serve {lacking} (it has: {', '.join(config.can.patterns)}); "
            f"--task.where={','.join(able)} leaves the rest dense"
        )
    for pattern in wanted.values():
        config.can.check(name, pattern, **layer)


def _check_transform(command: str, options: Namespace, attention: AttentionConfig) -> None:
    """Refuse a transform where it cannot work.

    Raises:
        ConfigError: training, or thresholds that are to be found on no batches.
        ValueError: an option of the transform.
        CapabilityError: an attention that yields no probabilities.
    """
    name = options.transform.name
    if command == "fit":
        raise ConfigError(
            f"--transform={name} works at inference: leave it out of fit, and give it to validate, test or predict"
        )
    config = make_transform_config(name, without_name(options.transform))
    able = attention.can.yields_probabilities
    require_probabilities(options.attention.name, able=able, what=f"--transform={name}")
    if config.calibrated and not options.backbone.calibrate:
        raise ConfigError(
            f"--transform={name} with these options looks at attention values first: set --backbone.calibrate=2, the "
            "batches of the training split that it looks at"
        )


def _check_depth(command: str, options: Namespace, task: Task) -> None:
    """Refuse a depth policy where it cannot work.

    Raises:
        ConfigError: an encoder-decoder, layers that are compiled or run twice, several processes, or a policy that
            nobody trained.
        ValueError: an option of the policy.
    """
    name = options.depth.name
    config = make_depth_config(name, without_name(options.depth))
    if task.load()[0].head == "seq2seq":
        raise ConfigError(f"--depth={name} works on encoders and on decoders; {task.name} takes an encoder-decoder")
    for option in ("gradient_checkpointing", "compile"):
        if options.backbone[option]:
            raise ConfigError(f"--depth={name} runs layers in groups of its own: leave --backbone.{option} off")
    if config.learns and command != "fit" and not options.get("ckpt_path") and not options.init_from:
        raise ConfigError(f"--depth={name} is learned: {command} needs a run trained with it, --ckpt_path=runs/NAME")
    if command == "fit" and str(options.trainer.devices) not in ("auto", "1"):  # several by `auto` are refused later
        raise ConfigError(
            f"--depth={name} trains in one process, got --trainer.devices={options.trainer.devices}; set it to 1"
        )
    if not config.learns and options.optim.train == "depth":
        raise ConfigError(f"--optim.train=depth needs a policy that learns; --depth={name} has nothing to learn")


def _check_trainer(trainer: Namespace, task: Task) -> None:
    for option, instead in _CUT_SHORT.items():
        value = trainer.get(option)
        # A fraction of 1.0 is everything; the whole number 1 is one batch.
        everything = value == 0 if option == "overfit_batches" else isinstance(value, float) and value == 1
        if not (value is None or value is False or everything):
            instead = instead.replace("max_eval", task.eval_limit)
            raise ConfigError(f"--trainer.{option} would count what it leaves out as done; use {instead}")
    threads = trainer.get("threads")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"--trainer.threads must be 1 to {MOST_THREADS}, got {threads}")
    if trainer.get("accumulate_grad_batches", 1) < 1:
        raise ConfigError("--trainer.accumulate_grad_batches must be at least 1")


def _check_trained(command: str, options: Namespace, task: Task) -> None:
    """Refuse to evaluate weights that nobody trained."""
    head = task.load()[0].head
    if command == "predict" and head == "question_answering" and not options.get("ckpt_path"):
        raise ConfigError("predict needs a trained run: --ckpt_path=runs/NAME")
    if command == "fit" or options.get("ckpt_path") or (options.init_from and not adapter_folder(options.init_from)):
        return
    if resolve_preset(options.backbone.name, head):
        raise ConfigError(
            f"{command} needs trained weights: --ckpt_path=runs/NAME, --init_from=runs/NAME, or a pretrained --backbone"
        )
    if head == "question_answering":
        console.say("note: no --ckpt_path and no --init_from: the backbone's answer layer may be untrained")
