"""A sweep's file, and the cells that it expands to: one command line each. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError
from astbench.files.paths import shown
from astbench.files.plain_yaml import MOST_CHARACTERS, plain_yaml
from astbench_registry.registry import config_class

COMMANDS = ("fit", "validate", "test", "bench")
"""Commands that leave a record."""

MOST_CELLS = 10_000

_KEYS = ("command", "config", "folder", "options", "axes", "exclude", "profiles", "slurm", "ray")
_OF_PROFILE = ("config", "options", "axes", "slurm", "ray")
_LAUNCHERS = ("slurm", "ray")
_TAKEN = ("logs", "failed", "sweep.json", "table.yaml")
"""Names in a sweep's folder that no cell may have."""

_LONGEST_NAME = 80
_OWN = ("run_dir", "resume", "config", "plugins", "trust_config")
_GROUPS = ("attention", "task", "backbone", "transform", "depth", "data", "optim", "trainer")
_TYPED = {
    "seed_everything": "seed",
    "attention.name": "attention",
    "task.name": "task",
    "transform.name": "transform",
    "depth.name": "depth",
    "backbone": "backbone.name",
}
"""Options that have a shorter name; in a sweep they go by that one."""

Options = dict[str, Any]
"""Option as it is typed, without its dashes -> value."""


@dataclass(frozen=True)
class Value:
    """One value of an axis: what it is called in the names of cells, the options that it sets, and its configs."""

    label: str
    options: Options
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Its folder below the sweep's.
        command: fit, validate, test or bench.
        configs: Files given by `--config`, the later winning.
        options: What is given beside them.
        folder: Where it runs.
    """

    name: str
    command: str
    configs: tuple[str, ...]
    options: Options
    folder: Path

    def words(self, plugins: Sequence[str] = ()) -> list[str]:
        """What is typed after `astbench`."""
        configs = [f"--config={path}" for path in self.configs]
        given = [f"--{key}={_typed(value)}" for key, value in self.options.items()]
        return [self.command, *configs, *given, *[f"--plugins={p}" for p in plugins], f"--run_dir={self.folder}"]


@dataclass(frozen=True)
class Sweep:
    """What a file says, under one of its profiles.

    Attributes:
        path: The file.
        command: Of every cell.
        configs: `--config` files of every cell.
        folder: Holds the cells' folders, `sweep.json` and `logs/`.
        options: Of every cell.
        axes: Name -> values; cells are their product.
        exclude: Cells that have all these options are left out.
        launchers: Name -> its options.
    """

    path: Path
    command: str
    configs: tuple[str, ...]
    folder: Path
    options: Options
    axes: Mapping[str, tuple[Value, ...]]
    exclude: tuple[Options, ...] = field(default=())
    launchers: Mapping[str, Options] = field(default_factory=dict)


def read_sweep(path: Path, profile: str | None = None) -> Sweep:
    """A sweep from its file.

    Args:
        path: YAML.
        profile: Which of its profiles; None for the file as it is without one.

    Raises:
        ConfigError: missing, no YAML, or something in it that cannot be; names the key.
    """
    said = _mapping(_read(path), str(path), _KEYS)
    profiles = said.get("profiles") or {}
    if not isinstance(profiles, dict) or not all(re.fullmatch(r"[\w.-]*\w", str(name)) for name in profiles):
        raise ConfigError(f"{path}: profiles must be a mapping of simple names to options, got {shown(profiles)}")
    profiles = {str(name): options for name, options in profiles.items()}
    if profile is None and profiles:
        raise ConfigError(f"{path} has profiles; choose one with --profile: {', '.join(map(str, profiles))}")
    chosen: dict[str, Any] = {}
    if profile is not None:
        if profile not in profiles:
            known = ", ".join(map(str, profiles)) or "none"
            raise ConfigError(f"{path} has no profile '{profile}'; it has: {known}")
        chosen = _mapping(profiles[profile], f"{path}: profiles.{profile}", _OF_PROFILE)
    command = said.get("command", "fit")
    if command not in COMMANDS:
        raise ConfigError(f"{path}: command must be one of {', '.join(COMMANDS)}, got {shown(command)}")
    folder = said.get("folder", f"runs/{path.stem}")
    if not isinstance(folder, str) or not folder or "\0" in folder:
        raise ConfigError(f"{path}: folder must be the name of a folder, got {shown(folder)}")
    axes = {**_axes(path, said.get("axes"), command), **_axes(path, chosen.get("axes"), command)}
    if not axes:
        raise ConfigError(f"{path} has no axes; a sweep needs one at least, such as axes: {{seed: [0, 1, 2]}}")
    return Sweep(
        path=path,
        command=command,
        configs=_configs(path, chosen.get("config", said.get("config"))),
        folder=Path(f"{folder}-{profile}" if profile is not None else folder),
        options={**_options(path, said.get("options"), command), **_options(path, chosen.get("options"), command)},
        axes=axes,
        exclude=_exclude(path, said.get("exclude"), command),
        launchers={name: {**_of(path, name, said), **_of(path, name, chosen)} for name in _LAUNCHERS},
    )


def _of(path: Path, launcher: str, said: Options) -> Options:
    found = said.get(launcher) or {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path}: {launcher} must be a mapping of its options, got {shown(found)}")
    return found


def expand(sweep: Sweep) -> tuple[list[Cell], list[str]]:
    """The cells, and what was left out of them, a sentence each.

    Options of an attention go to the cells whose attention has them: `dense` has no density, so a sweep over densities
    has it once. In `options` of `bench` nothing is left out.

    Raises:
        ConfigError: no cell, too many, two of one name, or an option that no attention of the sweep has.
    """
    count = 1
    for values in sweep.axes.values():
        count *= len(values)
    if count > MOST_CELLS:
        raise ConfigError(f"{sweep.path} expands to {count:,} cells, more than {MOST_CELLS:,}; split it")
    cells: dict[str, Cell] = {}
    taken: set[str] = set()
    foreign: dict[str, set[str]] = {}
    excluded, idle = 0, list(sweep.exclude)
    for values in itertools.product(*sweep.axes.values()):
        options, configs = _joined(sweep, values)
        if matching := [rule for rule in sweep.exclude if _matches(options, rule)]:
            excluded += 1
            idle = [rule for rule in idle if rule not in matching]
            continue
        dropped = set() if sweep.command == "bench" else _foreign(options)
        taken |= options.keys() - dropped
        for key in dropped:
            foreign.setdefault(key, set()).add(str(options["attention"]))
        labels = [v.label for v in values if v.configs or not v.options or not v.options.keys() <= dropped]
        name = _folder_name(sweep, labels)
        kept = {key: value for key, value in options.items() if key not in dropped}
        cell = Cell(name, sweep.command, configs, kept, sweep.folder / name)
        if cells.setdefault(name.casefold(), cell) != cell:
            raise ConfigError(f"{sweep.path}: two cells are called {name}; give values a name of their own with `as`")
    if unknown := sorted(foreign.keys() - taken):
        whose = ", ".join(sorted(foreign[unknown[0]]))
        raise ConfigError(f"{sweep.path}: no attention of the sweep takes {unknown[0]} ({whose})")
    if not cells:
        raise ConfigError(f"{sweep.path}: exclude leaves no cell")
    _refuse_doubles(sweep, list(cells.values()))
    notes = [f"{key} is not for {', '.join(sorted(names))}" for key, names in sorted(foreign.items())]
    if excluded:
        notes.append(f"{excluded} of {count} combinations are excluded")
    notes += [f"exclude {json.dumps(rule)} matches nothing" for rule in idle]
    return list(cells.values()), notes


def _joined(sweep: Sweep, values: Sequence[Value]) -> tuple[Options, tuple[str, ...]]:
    """Options and configs of one combination of values.

    Raises:
        ConfigError: two axes set the same option.
    """
    options, configs = {**sweep.options}, sweep.configs
    set_by: dict[str, str] = {}
    for axis, value in zip(sweep.axes, values, strict=True):
        for key in value.options:
            if key in set_by:
                raise ConfigError(f"{sweep.path}: axes.{set_by[key]} and axes.{axis} both set {key}; leave it to one")
            set_by[key] = axis
        options |= value.options
        configs += value.configs
    return options, configs


def _folder_name(sweep: Sweep, labels: Sequence[str]) -> str:
    """The cell's, from the labels of its values: safe as a folder, not too long, and not one that the sweep needs."""
    parts = [re.sub(r"[^\w.+=-]+", "-", label).strip("-.") for label in labels]
    if not all(parts):
        empty = labels[parts.index("")]
        raise ConfigError(f"{sweep.path}: a value called {shown(empty)} leaves no name for a folder; name it with `as`")
    name = "-".join(parts) or "run"
    if len(name.encode()) > _LONGEST_NAME:
        name = (
            f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        )
    if name.casefold() in _TAKEN:
        raise ConfigError(f"{sweep.path}: no cell may be called {name}, which the sweep itself needs; use `as`")
    return name


def _refuse_doubles(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """The same run under two names would be measured twice and counted twice."""
    seen: dict[str, str] = {}
    for cell in cells:
        does = json.dumps([cell.configs, cell.options], sort_keys=True)
        if does in seen:
            raise ConfigError(f"{sweep.path}: {seen[does]} and {cell.name} are the same run; leave one out")
        seen[does] = cell.name


def _read(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        return plain_yaml(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; a sweep is a YAML file, see `astbench run --help`") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _mapping(data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping with some of {', '.join(known)}")
    for key in data:
        if key not in known:
            raise ConfigError(f"{where} takes no {shown(key)}; it takes {', '.join(known)}")
    return data


def _configs(path: Path, said: Any) -> tuple[str, ...]:
    files = [] if said is None else said if isinstance(said, list) else [said]
    if not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"{path}: config must be a file or a list of files, got {shown(said)}")
    return tuple(files)


def _options(path: Path, said: Any, command: str, where: str = "options") -> Options:
    """`{trainer: {max_steps: 3}}` and `{trainer.max_steps: 3}` say the same; a bench has no groups."""
    if said is None:
        return {}
    if not isinstance(said, dict) or not all(isinstance(key, str) and key for key in said):
        raise ConfigError(f"{path}: {where} must be a mapping of option to value, got {shown(said)}")
    found: Options = {}
    for key, value in said.items():
        inner = value if command != "bench" and key in _GROUPS and isinstance(value, dict) else None
        pairs = {key: value} if inner is None else {f"{key}.{option}": held for option, held in inner.items()}
        for name, held in pairs.items():
            name = name.removeprefix("--")
            name = _TYPED.get(name, name)
            if name in _OWN:
                raise ConfigError(f"{path}: {where} takes no {name}: {_INSTEAD.get(name, 'the sweep gives it')}")
            if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
                raise ConfigError(f"{path}: {where} holds {shown(name)}, which is no option")
            if not _plain(held):
                raise ConfigError(f"{path}: {where}.{name} must be text, a number, a list or a mapping, got {held}")
            if name in found:
                raise ConfigError(f"{path}: {where} sets {name} twice")
            found[name] = held
    return found


def _plain(value: Any) -> bool:
    """Whether it can be typed as it is: YAML also knows dates, sets and numbers that are none."""
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(held) for key, held in value.items())
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


_INSTEAD = {
    "config": "it has a key of its own in the file",
    "plugins": "code is named on the command line, astbench run --plugins=FILE",
    "trust_config": "a sweep runs no code that a config names",
}


def _axes(path: Path, said: Any, command: str) -> dict[str, tuple[Value, ...]]:
    if said is None:
        return {}
    if not isinstance(said, dict) or not all(isinstance(key, str) and key for key in said):
        raise ConfigError(f"{path}: axes must be a mapping of name to values, got {shown(said)}")
    found = {}
    for key, values in said.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: axes.{key} must be a list of values, got {shown(values)}")
        found[key] = tuple(_value(path, key, value, command) for value in values)
        labels = [value.label for value in found[key]]
        if double := next((label for label in labels if labels.count(label) > 1), None):
            raise ConfigError(f"{path}: axes.{key} has two values called {double}; name them with `as`")
    return found


def _value(path: Path, axis: str, value: Any, command: str) -> Value:
    if isinstance(value, dict):
        options = {key: held for key, held in value.items() if key not in ("as", "config")}
        configs = _configs(path, value.get("config"))
        checked = _options(path, options, command, f"axes.{axis}")
        parts = [*(Path(file).stem for file in configs), *(_label(key, held) for key, held in options.items())]
        called = value.get("as", "-".join(parts))
        if not isinstance(called, str | int | float) or isinstance(called, bool):
            raise ConfigError(f"{path}: axes.{axis}: `as` must be a name, got {shown(called)}")
        return Value(str(called), checked, configs)
    checked = _options(path, {axis: value}, command, f"axes.{axis}")
    return Value(_label(axis, value), checked)


def _label(key: str, value: Any) -> str:
    """`ast`, `density0.25`, `seed3`: names of attentions and tasks stand for themselves."""
    text = value if isinstance(value, str) else json.dumps(value)
    last = key.removeprefix("--").rpartition(".")[2]
    return text if last in ("attention", "task", "transform", "depth", "name", "backbone") else f"{last}{text}"


def _exclude(path: Path, said: Any, command: str) -> tuple[Options, ...]:
    if said is None:
        return ()
    if not isinstance(said, list) or not all(isinstance(rule, dict) and rule for rule in said):
        raise ConfigError(f"{path}: exclude must be a list of mappings of option to value, got {shown(said)}")
    return tuple(_options(path, rule, command, "exclude") for rule in said)


def _matches(options: Mapping[str, Any], rule: Options) -> bool:
    """A list in a rule means one of these."""
    return all(
        key in options and (options[key] in value if isinstance(value, list) else options[key] == value)
        for key, value in rule.items()
    )


def _foreign(options: Mapping[str, Any]) -> set[str]:
    """Options of an attention that the cell's attention, where it names one, does not have."""
    if "attention" not in options:
        return set()
    known = _options_of(str(options["attention"]))
    return {
        k for k in options if k.startswith("attention.") and k.removeprefix("attention.").split(".")[0] not in known
    }


def _options_of(attention: str) -> set[str]:
    config = config_class(attention)
    return {*(option.name for option in fields(config)), *config.renamed}


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
