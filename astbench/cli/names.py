"""First phase of the command line, without torch: which attention and task are meant, by argv and configs.

LightningCLI cannot take `--attention=ast` by a registered name by itself. So the names are found first (the
last one said wins; the command line beats config files), then one parser is built for exactly those classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from astbench.errors import CheckpointError, ConfigError, NameOrPluginError
from astbench.runs.folder import CONFIG
from astbench.tasks import find_task, load_plugin, registered_tasks
from astbench.tasks.registry import task_of_class
from astbench_registry import PluginError, RegistryError
from astbench_registry import load_plugin as load_attentions
from astbench_registry.registry import config_class

KINDS = ("attention", "task")


@dataclass
class Selection:
    """What the first phase found.

    Attributes:
        attention: Registered name.
        task: Registered name.
        plugins: Files and modules that were loaded.
        said: The arguments as they were typed, after the subcommand.
        argv: The same as the second phase's parser takes them.
        resume: Run folder to go on with.
        debug: Show tracebacks.
        trust_config: Configs may name plugins and any class.
        help: Help was asked for.
    """

    attention: str | None = None
    task: str | None = None
    plugins: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)
    resume: str | None = None
    debug: bool = False
    trust_config: bool = False
    help: bool = False


def select(argv: list[str]) -> Selection:
    """Find the names in argv (without the subcommand) and in the configs it names.

    Raises:
        ConfigError: an unreadable config, or plugins in a config that is not trusted.
        NameOrPluginError: unknown names, plugins that do not load.
        CheckpointError: `--resume` or `--ckpt_path` of a folder without a config.
    """
    found = Selection(said=list(argv))
    rest: list[str] = []
    configs: list[str] = []
    for option, value, original in _options(argv):
        match option:
            case "-h" | "--help":
                found.help = True
                rest += original
            case "--debug":
                found.debug = True
            case "--trust_config":
                found.trust_config = True
            case "--plugins" if value:
                found.plugins += [p for p in value.split(",") if p]
            case "--attention" | "--attention.name" if value:
                found.attention = value
            case "--task" | "--task.name" if value:
                found.task = value
            case "--seed" if value:
                rest.append(f"--seed_everything={value}")
            case "--backbone" if value:
                rest.append(f"--backbone.name={value}")
            case "--resume":
                if not value:
                    raise ConfigError("--resume needs the run folder: --resume=runs/NAME")
                found.resume = value
            case "--config" | "-c" if value:
                configs.append(value)
                rest.append(f"--config={value}")
            case "--config" | "-c":
                raise ConfigError("--config needs a file: --config=runs/NAME/config.yaml")
            case "--ckpt_path" if value:
                configs += (beside := _beside(value))
                rest = [f"--config={file}" for file in beside] + rest + [f"--ckpt_path={value}"]
            case _:
                rest += original
    if found.resume:
        config = str(Path(found.resume) / CONFIG)
        if not Path(config).is_file():
            raise CheckpointError(f"--resume={found.resume} is not a run folder: it has no {CONFIG}")
        if rest or found.attention or found.task:
            others = rest or ["--attention or --task"]
            raise ConfigError(
                f"--resume goes on with a run as it was configured and takes no {others[0].split('=')[0]}; to change "
                "options start a new run, from its weights with --init_from=RUN"
            )
        configs.insert(0, config)
        rest = [f"--config={config}", *rest, f"--run_dir={found.resume}"]
    for config in configs:
        _names_from(config, found, said=argv)
    found.argv = rest
    _load_plugins(found)
    return found


def _options(argv: list[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """(option, value, the arguments it was written as); `--option value` and `--option=value` alike."""
    position = 0
    while position < len(argv):
        word = argv[position]
        following = argv[position + 1] if position + 1 < len(argv) else None
        if word.startswith("--") and "=" in word:
            option, value = word.split("=", 1)
            yield option, value, [word]
        elif word.startswith("-") and following is not None and not following.startswith("-"):
            yield word, following, [word, following]
            position += 1
        else:
            yield word, None, [word]
        position += 1


def _beside(checkpoint: str) -> list[str]:
    """The config of the run that a checkpoint (or its folder) belongs to."""
    path = Path(checkpoint).expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise CheckpointError(f"--ckpt_path={checkpoint} does not exist")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"--ckpt_path={checkpoint}: no {CONFIG} beside it says what was trained")
    return [str(folder / CONFIG)]


def read_config(path: str) -> dict[str, Any]:
    """A config file as a dictionary.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config={path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config={path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config={path} holds no options")
    for group in ("attention", "task", "backbone"):
        if not isinstance(data.get(group), (dict, str, type(None))):
            raise ConfigError(f"--config={path}: {group} must be a name or a group of options")
    for group in ("data", "optim", "trainer"):
        if not isinstance(data.get(group), (dict, type(None))):
            raise ConfigError(f"--config={path}: {group} must be a group of options")
    if not isinstance(data.get("plugins"), (list, type(None))):
        raise ConfigError(f"--config={path}: plugins must be a list")
    return data


def _names_from(path: str, found: Selection, said: list[str]) -> None:
    config = read_config(path)
    for kind in KINDS:
        name = config.get(kind)
        name = name.get("name") if isinstance(name, dict) else name
        if name and getattr(found, kind) is None:
            if ":" in str(name):  # ./mine.py:Mine names a plugin, too
                _trust(str(name).rpartition(":")[0], path, found)
            setattr(found, kind, str(name))
    for plugin in config.get("plugins") or []:
        _trust(plugin, path, found)


def _trust(plugin: str, path: str, found: Selection) -> None:
    """Take a plugin that a config names, if the command line says so."""
    if plugin in found.plugins:
        return
    if not found.trust_config:
        raise ConfigError(
            f"{path} names the plugin {plugin}, and plugins are code: add --plugins={plugin} to run it, or "
            "--trust_config to run whatever the config names"
        )
    found.plugins.append(plugin)


def _load_plugins(found: Selection) -> None:
    try:
        for plugin in found.plugins:
            load_plugin(plugin)
        name = found.attention
        if name and ":" in name:
            # ./mine.py:Mine is a plugin and the name that its class registered.
            plugin = name.rpartition(":")[0]
            found.attention = name_of_class(name)
            if plugin not in found.plugins:
                found.plugins.append(plugin)
        if found.task and ":" in found.task:
            plugin = found.task.rpartition(":")[0]
            found.task = task_of_class(found.task)
            if plugin not in found.plugins:
                found.plugins.append(plugin)
    except RegistryError as error:
        raise NameOrPluginError(str(error)) from error


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


def check_names(found: Selection) -> None:
    """Both names are given and known.

    Raises:
        ConfigError: one is missing.
        NameOrPluginError: one is unknown, or its plugin does not load.
    """
    if found.attention is None:
        raise ConfigError("--attention=NAME is required; `astbench list` shows the names")
    if found.task is None:
        raise ConfigError(f"--task=NAME is required: {', '.join(registered_tasks())}")
    try:
        config_class(found.attention)
        find_task(found.task)
    except RegistryError as error:
        raise NameOrPluginError(str(error)) from error


def attention_options(found: Selection, command: str) -> dict[str, Any]:
    """The `--attention.OPTION=VALUE` among the arguments, for commands that take nothing else.

    Raises:
        ConfigError: another flag, or a value that is not YAML.
    """
    for kind in KINDS:
        if getattr(found, kind) is not None:
            raise ConfigError(f"astbench {command} takes no --{kind}={getattr(found, kind)}")
    options = {}
    for word in (w for w in found.argv if w.startswith("-")):
        option, equals, value = word.partition("=")
        if not (option.startswith("--attention.") and equals):
            raise ConfigError(f"astbench {command} takes no {word}")
        try:
            options[option.removeprefix("--attention.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{option} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return options
