"""The command line, read once: argv and the YAML files that it names, in one object that every command asks.

`--option value`, `--option=value` and `--group='{option: value}'` say the same, in argv as in a file. The last one said
wins, and what was typed wins over files. Imports nothing heavy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import exists, isdir, isfile  # of names that the system refuses pathlib's own raise
from pathlib import Path
from typing import Any

import yaml

from astbench.cli.config_files import CODE, NAMED, ConfigFile, parse_yaml, read_config, read_options
from astbench.errors import CheckpointError, ConfigError
from astbench.runs.folder import CONFIG
from astbench_registry.plugins import plugin_key

GROUPS = (*NAMED, "data", "optim", "trainer")
SWITCHES = ("--help", "--debug", "--trust_config", "--explain", "--all")
"""Options that take no value: the word behind one stands for itself."""

_SHORT = {"-h": "--help", "-c": "--config"}
_PLUGINS = ("--plugins", "--plugins+")
_ANSWERED = (*_PLUGINS, "--debug", "--trust_config")
"""Options of every command that no parser behind this module needs to know."""
_NEED_VALUE = (
    *(f"--{kind}{name}" for kind in CODE for name in ("", ".name")),
    "--plugins",
    "--ckpt_path",
    "--seed",
)
"""Options that are looked at here, so that no parser behind this module would miss their value."""


@dataclass(frozen=True)
class Option:
    """One option as it was typed.

    Attributes:
        name: With its dashes, `-h` and `-c` as the words they stand for.
        value: None where none was given.
    """

    name: str
    value: str | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


@dataclass(frozen=True)
class CommandLine:
    """What was asked for, after the command's own name.

    Attributes:
        typed: The arguments as they were typed.
        options: The options among them, groups taken apart, in order; without `--config`, which `configs` holds.
        words: The arguments that belong to no option, such as names.
        configs: The files, in the order in which the later wins; first the one beside a checkpoint.
        attention: Registered name; as it was said until its plugin is loaded.
        task: Registered name.
        transform: Registered name; None for none.
        depth: Registered name; None for none.
        plugins: Files and modules to load, from argv and from configs that are trusted.
    """

    typed: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    words: tuple[str, ...] = ()
    configs: tuple[ConfigFile, ...] = ()
    attention: str | None = None
    task: str | None = None
    transform: str | None = None
    depth: str | None = None
    plugins: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether an option or switch was typed."""
        return any(option.name == name for option in self.options)

    def typed_value(self, *names: str) -> str | None:
        """The last value that was typed under any of these names; None where there is none."""
        values = [option.value for option in self.options if option.name in names and option.value]
        return values[-1] if values else None

    def value(self, key: str) -> str | None:
        """What was said of `GROUP.OPTION`, typed or in a file, in text; None where nothing was."""
        group, _, option = key.partition(".")
        by_name = [f"--{group}"] if group in NAMED and option == "name" else []
        if (typed := self.typed_value(f"--{key}", *by_name)) is not None:
            return typed
        held = [config.value(group, option) for config in self.configs]
        return next((str(value) for value in reversed(held) if value is not None), None)

    @property
    def help(self) -> bool:
        """Help was asked for."""
        return self.has("--help")

    @property
    def trust_config(self) -> bool:
        """Configs may name plugins and any class."""
        return self.has("--trust_config")

    @property
    def resume(self) -> str | None:
        """Run folder to go on with."""
        return self.typed_value("--resume")

    def arguments(self, *without: str) -> list[str]:
        """What was typed, for a parser: without files, plugins and the options in `without`; one argument each."""
        return [*(str(o) for o in self.options if o.name not in (*_ANSWERED, *without)), *self.words]

    def others(self, *taken: str) -> list[Option]:
        """What was said beside the options of every command, and those `taken`."""
        files = [Option("--config", config.path) for config in self.configs]
        return [*files, *(o for o in self.options if o.name not in (*_ANSWERED, "--help", *taken))]

    def attention_options(self, command: str, *switches: str, group: str = "attention") -> dict[str, Any]:
        """The `--attention.OPTION` values, or another group's, for commands that take no other options but `switches`.

        Raises:
            ConfigError: another option, a file, or a value that is not YAML.
        """
        options = {}
        for option in self.others(*switches):
            if not option.name.startswith(f"--{group}.") or option.name == f"--{group}.name":
                raise ConfigError(f"astbench {command} takes no {option}")
            if option.value is None:
                raise ConfigError(f"{option.name} needs a value: {option.name}=VALUE")
            options[option.name.removeprefix(f"--{group}.")] = _number(parse_yaml(option.value, option.name))
        return options


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Take the arguments behind the command's name apart, and read the configs they name, each once.

    Raises:
        ConfigError: an unreadable config, plugins in a config that is not trusted, an option that lacks its value.
        CheckpointError: `--resume` or `--ckpt_path` of a folder without a config.
    """
    options, words = _split(argv)
    files: list[str] = []
    for option in options:
        if option.name == "--config" and not option.value:
            raise ConfigError("--config needs a file: --config=runs/NAME/config.yaml")
        if option.name == "--resume" and not option.value:
            raise ConfigError("--resume needs the run folder: --resume=runs/NAME")
        if option.name in _NEED_VALUE and not option.value:
            raise ConfigError(f"{option.name} needs a value: {option.name}=VALUE")
        if option.name == "--config":
            files.append(str(option.value))
        elif option.name == "--ckpt_path":
            files.insert(0, _beside(str(option.value)))
    line = CommandLine(
        typed=tuple(argv),
        options=tuple(part for option in options if option.name != "--config" for part in _apart(option)),
        words=tuple(words),
    )
    if line.resume:
        files = [_resumed(line.resume, [*options, *map(Option, words)])]
    line = replace(line, configs=tuple(read_config(file) for file in files))
    names = {kind: line.value(f"{kind}.name") for kind in CODE}
    line = replace(line, attention=names["attention"], task=names["task"])
    line = replace(line, transform=names["transform"], depth=names["depth"])
    return replace(line, plugins=tuple(dict.fromkeys(_plugins(line))))


def _split(argv: Sequence[str]) -> tuple[list[Option], list[str]]:
    """Options with their values, and the words that belong to none."""
    options: list[Option] = []
    words: list[str] = []
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        if not _is_option(word):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if name in SWITCHES and equals:
            raise ConfigError(f"{name} takes no value, got {value}")
        if not equals and name not in SWITCHES and rest and not _is_option(rest[0]):
            equals, value = "=", rest.popleft()
        options.append(Option(name, value if equals else None))
    return options, words


def _is_option(word: str) -> bool:
    """Whether a word names an option; negative numbers and texts with spaces in front of any `=` are values."""
    name = word.partition("=")[0]
    return len(word) > 1 and word[0] == "-" and not any(map(str.isspace, name)) and _number(word) is word


def _number(value: Any) -> Any:
    """The number that a text says, also such as YAML takes for text (1e-3); anything else as it is."""
    if not isinstance(value, str) or not any(map(str.isdigit, value)):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _apart(option: Option) -> Iterator[Option]:
    """A group's options one by one, from `{option: value}` or a file of them; any other option as it is."""
    group, value = option.name.removeprefix("--"), option.value
    held: Any = None
    if group in GROUPS and value and value.lstrip().startswith("{"):
        held = parse_yaml(value, option.name)
    elif group in GROUPS and group not in NAMED and value and exists(value) and not isdir(value):
        held = read_options(value, option.name)
    if not isinstance(held, dict):
        yield option
        return
    for key, part in held.items():
        yield Option(f"{option.name}.{key}", _text(part))


def _text(value: Any) -> str:
    """A value as it is typed in one argument."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True, width=float("inf"))).removesuffix("...\n").strip()


def _beside(checkpoint: str) -> str:
    """The config of the run that a checkpoint (or its folder) belongs to."""
    path = Path(checkpoint).expanduser()
    folder = path if isdir(path) else path.parent
    if not exists(path):
        raise CheckpointError(f"--ckpt_path={checkpoint} does not exist")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"--ckpt_path={checkpoint}: no {CONFIG} beside it says what was trained")
    return str(folder / CONFIG)


def _resumed(run: str, said: Sequence[Option]) -> str:
    """The config of the run to go on with; nothing else may be said about how it goes on."""
    config = Path(run) / CONFIG
    if not isfile(config):
        if isfile(run):
            raise CheckpointError(f"--resume={run} is not a run folder, it is a file; name the folder that it is in")
        raise CheckpointError(
            f"--resume={run} is not a run folder: it has no {CONFIG}; a run that was killed before it wrote one is "
            f"begun again with --run_dir={run}"
        )
    others = [option.name for option in said if option.name not in (*_ANSWERED, "--resume")]
    if others:
        raise ConfigError(
            f"--resume goes on with a run as it was configured and takes no {others[0]}; to change options start a new "
            "run, from its weights with --init_from=RUN"
        )
    return str(config)


def _plugins(line: CommandLine) -> Iterator[str]:
    """The plugins that were typed, then those of configs, which are code that only trust lets run."""
    typed = list(_typed_plugins(line.options))
    yield from typed
    names = [line.typed_value(f"--{kind}", f"--{kind}.name") for kind in CODE]
    known = {plugin_key(plugin) for plugin in (*typed, *_files_of(names))}
    for config in line.configs:
        named = [str(plugin) for key in ("plugins", "plugins+") for plugin in config.data.get(key) or []]
        for kind, typed_name in zip(CODE, names, strict=True):
            chosen = getattr(line, kind)
            if typed_name is None and chosen == config.value(kind, "name"):
                named += _files_of([chosen])
        for plugin in named:
            if plugin_key(plugin) in known:
                continue
            if not line.trust_config:
                raise ConfigError(
                    f"{config.path} names the plugin {plugin}, and plugins are code: add --plugins={plugin} to run it, "
                    "also where a run of your own goes on, or --trust_config to run whatever the config names"
                )
            yield plugin


def _files_of(names: Sequence[str | None]) -> list[str]:
    """The plugins in names such as `./mine.py:Mine`, of which a bench takes several, separated by commas."""
    return [part.rpartition(":")[0] for name in names for part in (name or "").split(",") if ":" in part]


def _typed_plugins(options: Sequence[Option]) -> Iterator[str]:
    """From `--plugins=one,two`, `--plugins=[one,two]` or one `--plugins` each."""
    for option in options:
        if option.name in _PLUGINS and option.value:
            listed = parse_yaml(option.value, option.name) if option.value.startswith("[") else option.value.split(",")
            yield from (str(plugin) for plugin in listed if plugin)
