"""YAML files of options: read in one place, each once, and written anew for jsonargparse, which reads files only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from astbench.errors import ConfigError
from astbench.files.plain_yaml import MOST_CHARACTERS, plain_yaml

NAMED = ("attention", "task", "backbone", "transform", "depth")
"""Groups whose name alone may stand for them: `attention: ast` is `attention: {name: ast}`."""

CODE = ("attention", "task", "transform", "depth")
"""Groups whose name may be that of a class in a file, `./mine.py:Mine`."""

LINKED = {*NAMED, "optim", "seed", "init_from"}
"""What the model takes from the options of that name."""


@dataclass(frozen=True)
class ConfigFile:
    """A config and what it holds.

    Attributes:
        path: As it was given.
        data: The options, as YAML says them.
    """

    path: str
    data: Mapping[str, Any]

    def value(self, group: str, option: str) -> Any:
        """An option of a group; None where the file does not say."""
        held = self.data.get(group)
        if isinstance(held, str):
            return held if group in NAMED and option == "name" else None
        for part in option.split("."):
            held = held.get(part) if isinstance(held, dict) else None
        return held


def parse_yaml(text: str, source: str) -> Any:
    """What YAML says; `source` is the option that a mistake is told under.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        return plain_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error


def read_options(path: str, option: str = "--config") -> dict[str, Any]:
    """The options in a YAML file that `option` names.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    source = f"{option}={path}"
    try:
        with open(path, encoding="utf-8") as file:  # a pipe too, which gives its text once
            text = file.read(MOST_CHARACTERS + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{source} does not exist") from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"{source} is not a file, it is a folder; name the file in it: {source}/config.yaml"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {' '.join(str(error).split())[:200]}") from error
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds no options")
    return data


def read_config(path: str) -> ConfigFile:
    """A `--config` file.

    Raises:
        ConfigError: as :func:`read_options`, or a group that is none.
    """
    data = read_options(path)
    _check_groups(path, data)
    return ConfigFile(path, data)


def _check_groups(path: str, data: Mapping[str, Any]) -> None:
    """Refuse what is no group of options where one must be, and ways around the groups that are looked at."""
    for group in NAMED:
        if not isinstance(data.get(group), (dict, str, type(None))):
            raise ConfigError(f"--config={path}: {group} must be a name or a group of options")
        if isinstance(data.get(group), dict) and not isinstance(data[group].get("name"), (str, type(None))):
            raise ConfigError(f"--config={path}: {group}.name must be a name, got {str(data[group]['name'])[:60]}")
    if "config" in data:
        raise ConfigError(f"--config={path}: a config names no other; give both, --config=ONE --config=TWO")
    if dotted := next((key for key in data if "." in str(key)), None):
        group, _, option = str(dotted).partition(".")
        raise ConfigError(f"--config={path}: write {dotted} as a group, {group}: {{{option}: ...}}")
    for group in ("data", "optim", "trainer", "model"):
        if not isinstance(data.get(group), (dict, type(None))):
            raise ConfigError(f"--config={path}: {group} must be a group of options")
    if linked := sorted(LINKED & set(data.get("model") or ())):
        raise ConfigError(f"--config={path}: model.{linked[0]} is set by {linked[0]} alone; write it without model")
    for key in ("plugins", "plugins+"):
        if not isinstance(data.get(key), (list, type(None))):
            raise ConfigError(f"--config={path}: {key} must be a list")


def config_arguments(configs: Iterable[Mapping[str, Any]], folder: Path) -> list[str]:
    """Write options to files in `folder`, one each, and return the `--config` arguments that name them in order."""
    arguments = []
    for number, options in enumerate(configs):
        file = folder / f"{number}.yaml"
        file.write_text(yaml.safe_dump(dict(options)), encoding="utf-8")
        arguments.append(f"--config={file}")
    return arguments
