"""First phase of the command line, without torch: which attention and task are meant, and are they known.

LightningCLI cannot take `--attention=ast` by a registered name by itself. So the names are found first, then one parser
is built for exactly those classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from astbench.cli.command_line import CommandLine, read_command_line
from astbench.errors import ConfigError, NameOrPluginError
from astbench.tasks import find_task, load_plugin, registered_tasks
from astbench.tasks.registry import task_of_class
from astbench_registry import PluginError, RegistryError, UnknownAttentionError
from astbench_registry import load_plugin as load_attentions
from astbench_registry.depth.registry import depth_config_class, depth_of_class, registered_depths
from astbench_registry.name_table import did_you_mean
from astbench_registry.registry import config_class, current_names, registered
from astbench_registry.transforms.registry import (
    registered_transforms,
    transform_config_class,
    transform_of_class,
)


def read_names(argv: Sequence[str]) -> CommandLine:
    """The command line, with its plugins loaded and `./mine.py:Mine` under the name that it registers.

    Raises:
        ConfigError: as :func:`read_command_line`.
        NameOrPluginError: plugins that do not load.
        CheckpointError: as :func:`read_command_line`.
    """
    line = read_command_line(argv)
    try:
        for plugin in line.plugins:
            load_plugin(plugin)
        return _under_current_names(_registered_as(line))
    except RegistryError as error:
        raise NameOrPluginError(str(error)) from error


def _registered_as(line: CommandLine) -> CommandLine:
    """`./mine.py:Mine` names a plugin, and what its class registered."""
    if line.attention and ":" in line.attention:
        plugins = dict.fromkeys([*line.plugins, line.attention.rpartition(":")[0]])
        line = replace(line, attention=name_of_class(line.attention), plugins=tuple(plugins))
    if line.task and ":" in line.task:
        plugins = dict.fromkeys([*line.plugins, line.task.rpartition(":")[0]])
        line = replace(line, task=task_of_class(line.task), plugins=tuple(plugins))
    if line.transform and ":" in line.transform:
        plugins = dict.fromkeys([*line.plugins, line.transform.rpartition(":")[0]])
        line = replace(line, transform=transform_of_class(line.transform), plugins=tuple(plugins))
    if line.depth and ":" in line.depth:
        plugins = dict.fromkeys([*line.plugins, line.depth.rpartition(":")[0]])
        line = replace(line, depth=depth_of_class(line.depth), plugins=tuple(plugins))
    return line


def _under_current_names(line: CommandLine) -> CommandLine:
    """Options of the attention that were given by a former name, by today's; what was typed so is told on stderr."""
    if line.attention not in registered():
        return line  # missing or unknown, which check_names says; or several, of a bench
    attention, renamed = line.attention, config_class(line.attention).renamed
    options = []
    for option in line.options:
        former = option.name.removeprefix("--attention.")
        if option.name.startswith("--attention.") and former in renamed:
            tell_former(former, renamed[former])
            option = replace(option, name=f"--attention.{renamed[former]}")
        options.append(option)
    configs = tuple(
        replace(config, data={**config.data, "attention": _current(config.data["attention"], attention)})
        if isinstance(config.data.get("attention"), dict)
        else config
        for config in line.configs
    )
    return replace(line, options=tuple(options), configs=configs)


def _current(given: dict[str, Any], attention: str) -> dict[str, Any]:
    """A config's options of the attention that it names, or, where it names none, of the chosen one."""
    return current_names(given) if "name" in given else config_class(attention).current(given)


def tell_former(former: str, name: str) -> None:
    """On stderr: an option was given by a name of before."""
    print(f"astbench: note: --attention.{former} is called --attention.{name} now", file=sys.stderr)


def current_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Typed options of an attention under their names of today, with a note on those that have another."""
    config = config_class(name)
    for former in (key for key in options if key in config.renamed):
        tell_former(former, config.renamed[former])
    return config.current(options)


def name_of_class(target: str) -> str:
    """The name under which `./mine.py:Mine` registers that class; loads the plugin.

    Raises:
        PluginError: it does not load, or registers no such class.
    """
    from astbench_registry.registry import attention_class

    plugin, _, cls = target.rpartition(":")
    names = load_attentions(plugin)
    for name in names:
        if attention_class(name).__name__ == cls:
            return name
    raise PluginError(f"{plugin} registers no class '{cls}'; it registers: {', '.join(names)}")


def kind_of(name: str) -> Literal["attention", "transform", "depth"]:
    """What a name, or `./mine.py:Mine`, is that of: of two of one name the attention, then the transform.

    Raises:
        UnknownAttentionError: it is nobody's, with the nearest name and all of them.
    """
    attentions, transforms, depths = registered(), registered_transforms(), registered_depths()
    if ":" in name:
        target, _, cls = name.rpartition(":")
        load_plugin(target)
        if any(row.cls is not None and row.cls.__name__ == cls for row in registered_transforms().values()):
            return "transform"
        is_depth = any(row.cls is not None and row.cls.__name__ == cls for row in registered_depths().values())
        return "depth" if is_depth else "attention"
    if name in attentions:
        return "attention"
    if name in transforms or name in depths:
        return "transform" if name in transforms else "depth"
    names = [*attentions, *transforms, *depths]
    hint = did_you_mean(name, names)
    raise UnknownAttentionError(
        f"unknown attention, transform or depth policy '{name}'{hint} registered: {', '.join(attentions)}; transforms: "
        f"{', '.join(transforms)}; depth: {', '.join(depths)}"
    )


def check_names(line: CommandLine) -> None:
    """Both names are given and known, and those of a transform and a depth policy where there are any.

    Raises:
        ConfigError: one is missing, or that of a transform or policy whose options were given.
        NameOrPluginError: one is unknown, or its plugin does not load.
    """
    if line.attention is None:
        raise ConfigError("--attention=NAME is required; `astbench list` shows the names")
    if line.task is None:
        raise ConfigError(f"--task=NAME is required: {', '.join(registered_tasks())}")
    if line.transform is None and (lost := next((o for o in line.options if o.name.startswith("--transform.")), None)):
        raise ConfigError(f"{lost} needs a transform: --transform={' or '.join(registered_transforms())}")
    if line.depth is None and (lost := next((o for o in line.options if o.name.startswith("--depth.")), None)):
        raise ConfigError(f"{lost} needs a policy: --depth={' or '.join(registered_depths())}")
    try:
        config_class(line.attention)
        find_task(line.task)
        if line.transform is not None:
            transform_config_class(line.transform)
        if line.depth is not None:
            depth_config_class(line.depth)
    except RegistryError as error:
        raise NameOrPluginError(str(error)) from error
