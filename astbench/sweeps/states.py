"""How far a cell is, read from its folder; and whether what lies there is the cell's own run."""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from astbench.errors import ConfigError, DataError
from astbench.files.plain_yaml import plain_yaml
from astbench.files.text import read_text
from astbench.runs.folder import CONFIG, LAST, LOCK, PREVIOUS, RECORD, left_behind
from astbench.runs.record import read_record
from astbench.sweeps.spec import Cell
from astbench.tables.defaults import Options, bench_defaults, defaults, flatten
from astbench.tables.repeat import LONG, NO_EFFECT, TRAINS, find_source
from astbench_registry.registry import make_config

DONE, RESUMABLE, BEGUN, FAILED, RUNNING, MISSING = "done", "to resume", "to repeat", "failed", "running", "to run"
"""States of a cell: BEGUN holds a run that stopped before there was anything to go on from."""

ENDED = ("failed", "diverged", "out_of_memory")
"""States of records of runs that would end so again."""

_THREADS = "trainer.threads"

_BESIDE = ("ckpt_path", "init_from", "checkpoint_every", "keep_every", "loggers")
"""Options without a group that no default is needed for."""


@dataclass(frozen=True)
class Found:
    """What a cell's folder holds.

    Attributes:
        state: One of the above.
        record: The run's; None without one.
    """

    state: str
    record: dict[str, Any] | None = None


def look(cell: Cell) -> Found:
    """The state of a cell's folder.

    Raises:
        ConfigError: another run lies there.
    """
    if not cell.folder.exists():
        return Found(MISSING)
    if not cell.folder.is_dir():
        raise ConfigError(f"{cell.folder} is a file; the sweep needs a folder there")
    record = read_record(cell.folder / RECORD)
    if record is not None and (other := differs(cell, record)):
        raise ConfigError(f"{cell.folder} holds another run: {other}; move it away, or give the sweep another folder")
    if _locked(cell.folder):
        return Found(RUNNING, record)
    if record is None:
        if (cell.folder / CONFIG).is_file():
            return Found(BEGUN)
        if any(not left_behind(file) for file in cell.folder.iterdir()):
            raise ConfigError(f"{cell.folder} holds files and no run; give the sweep another folder")
        return Found(MISSING)
    if record["state"] == "done":
        return Found(DONE, record)
    if record["state"] in ENDED:
        return Found(FAILED, record)
    saved = any((cell.folder / name).is_file() for name in (LAST, PREVIOUS))
    return Found(RESUMABLE if saved and cell.command == "fit" else BEGUN, record)


def words_to_start(cell: Cell, plugins: Sequence[str]) -> list[str]:
    """What starts a cell, or goes on with it; a run that stopped before its first checkpoint makes room."""
    state = look(cell).state
    if state == RESUMABLE:
        return ["fit", f"--resume={cell.folder}", *[f"--plugins={plugin}" for plugin in plugins]]
    if state == BEGUN:
        shutil.rmtree(cell.folder)
    return cell.words(plugins)


def wanted(cell: Cell) -> Options:
    """Every option that decides what a cell computes, by `group.option`; of a bench by option.

    Raises:
        ConfigError: a config that cannot be read, or an option that there is none of.
        RegistryError, NameOrPluginError: an unknown attention or task.
    """
    configs = [*_of_checkpoint(cell), *(_config(path) for path in cell.configs)]
    given = {LONG.get(key, key) if cell.command != "bench" else key: value for key, value in cell.options.items()}
    if cell.command == "bench":
        plain = bench_defaults()
        laid = configs
        if unknown := next((key for key in given if key not in plain), None):
            raise ConfigError(f"{cell.name}: there is no option --{unknown}; see `astbench bench --help`")
    else:
        laid = [_flat(config) for config in configs]
        names = {
            k: v for layer in (*laid, given) for k, v in layer.items() if k.endswith(".name") or k == "data.source"
        }
        for group in ("attention", "task"):
            if f"{group}.name" not in names:
                raise ConfigError(f"{cell.name}: the sweep names no {group}; add it to options or axes")
        attention, task = str(names["attention.name"]), str(names["task.name"])
        source = str(names.get("data.source", find_source(task)))
        others = [None if names.get(key) is None else str(names[key]) for key in ("transform.name", "depth.name")]
        plain = defaults(attention, task, source, *others)
        laid = [_of_attention(layer, attention) for layer in laid]
        known = {".".join(key.split(".")[:2]) for key in plain}
        for key in given:
            if key not in _BESIDE and ".".join(key.split(".")[:2]) not in known:
                raise ConfigError(f"{cell.name}: there is no option --{key}; see `astbench {cell.command} --help`")
    found = dict(plain)
    for layer in (*laid, given):
        found |= layer
    if cell.command != "bench":
        _check_values(cell, found, plain, given)
    return found


def _check_values(cell: Cell, found: Options, plain: Options, given: Options) -> None:
    """Refuse at the plan what would otherwise fail cell by cell: words for numbers, and options of an attention.

    Raises:
        ConfigError: naming the cell and the option.
    """
    for key in given:
        default, value = plain.get(key), found[key]
        if isinstance(default, bool) or not isinstance(default, int | float) or value is None:
            continue
        number = _number(value)
        if number is None or (isinstance(default, int) and number != int(number)):
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise ConfigError(f"{cell.name}: --{LONG.get(key, key)} must be {kind}, got {value!r}")
        if key == "seed_everything" and number < 0:
            raise ConfigError(f"{cell.name}: --seed must be 0 or more, got {value!r}")
    asked = {key.partition(".")[2]: value for key, value in found.items() if key.startswith("attention.")}
    name = asked.pop("name")
    known = {key: plain.get(f"attention.{key}") for key in asked}
    as_read = {
        key: number if isinstance(known[key], float) and (number := _number(value)) is not None else value
        for key, value in asked.items()
    }
    try:
        make_config(str(name), as_read)
    except ValueError as error:
        raise ConfigError(f"{cell.name}: {error}") from error


def _number(value: Any) -> float | None:
    """A number, also as the text that YAML makes of `1e-4`; None for anything else."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def differs(cell: Cell, record: Mapping[str, Any]) -> str:
    """The first option in which a record is another run than the cell's; empty where it is the same."""
    if record.get("command") != cell.command:
        return f"its command is {record.get('command')}, the sweep's {cell.command}"
    config = record.get("config")
    if not isinstance(config, dict):
        return "its record holds no config"
    asked = wanted(cell)
    held = dict(config) if cell.command == "bench" else {"transform.name": None, "depth.name": None, **flatten(config)}
    ignored = (*NO_EFFECT, *(() if cell.command in ("fit", "bench") else TRAINS), "run_dir")
    for key, value in asked.items():
        if key == _THREADS and value is None:  # the record says how many there were
            continue
        if not key.startswith(ignored) and key in held and not _same(held[key], value):
            return f"--{key} is {held[key]} there and {value} here"
    return ""


def _same(held: Any, asked: Any) -> bool:
    """As numbers where both are, whatever YAML made of them (`1e-4` is text to it)."""
    if held == asked:
        return True
    if isinstance(asked, str) and isinstance(held, int | float) and not isinstance(held, bool):
        try:
            return float(asked) == held
        except ValueError:
            return False
    if isinstance(asked, str) and not isinstance(held, str):
        try:
            return bool(yaml.safe_load(asked) == held)
        except yaml.YAMLError:
            return False
    if isinstance(held, list | tuple) and isinstance(asked, list | tuple):
        return len(held) == len(asked) and all(_same(a, b) for a, b in zip(held, asked, strict=True))
    return False


def _of_checkpoint(cell: Cell) -> list[dict[str, Any]]:
    """The config of the run that a cell evaluates, as the command line takes it first."""
    asked = cell.options.get("ckpt_path")
    if not isinstance(asked, str) or cell.command == "fit":
        return []
    path = Path(asked).expanduser()
    file = (path if path.is_dir() else path.parent) / CONFIG
    return [_config(str(file))] if file.is_file() else []


def _config(path: str) -> dict[str, Any]:
    try:
        data = plain_yaml(read_text(Path(path)))
    except (DataError, ValueError) as error:
        raise ConfigError(f"--config={path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config={path} holds no options")
    return data


def _flat(config: Mapping[str, Any]) -> Options:
    """A file's options by `group.option`; a name may stand for its group."""
    groups = {
        key: {"name": value} if isinstance(value, str) and key in LONG else value for key, value in config.items()
    }
    flat = flatten(groups)
    return {k: v for k, v in flat.items() if "." in k or k in config or (k == "seed_everything" and "seed" in config)}


def _of_attention(layer: Options, attention: str) -> Options:
    """Options of another attention go with its name, as on the command line."""
    if layer.get("attention.name", attention) == attention:
        return layer
    return {key: value for key, value in layer.items() if not key.startswith("attention.")}


def _locked(folder: Path) -> bool:
    """Whether a process writes there now."""
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
