"""A deployment test's file: what is served, and the load that comes. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError, DataError
from astbench.files.paths import shown
from astbench.files.plain_yaml import plain_yaml
from astbench.files.text import read_text
from astbench.loadtest.objective import Objective
from astbench_registry.errors import RegistryError
from astbench_registry.registry import current_names, make_config

PATHS = ("/v1/completions", "/answer")

_KEYS = (
    "folder title path model text question servers serve load rates slo good_share client_timeout seed"
).split()  # fmt: skip
_OF_SERVER = ("model", "attention")
_OF_LOAD = ("length", "output", "requests", "slo")
_RATES = ("of_capacity", "per_second")
_SLO = tuple(f"{name}{end}" for name in ("latency", "ttft", "tpot") for end in ("", "_times"))
_SERVE = ("device", "dtype", "threads", "max_batch", "queue", "max_length", "timeout")
"""Options of `astbench serve` that a file may set; where it listens and how it stops is for this command to say."""

_TAKEN = ("logs", "failed")


@dataclass(frozen=True)
class Served:
    """One server.

    Attributes:
        name: What its cells and rows are called.
        model: Pretrained folder, or run of `astbench fit`.
        attention: `{name: ..., option: ...}`; of a run, what it was trained with.
        of_run: It is a run, which brings its attention.
    """

    name: str
    model: str
    attention: Mapping[str, Any]
    of_run: bool

    def words(self, serve: Mapping[str, Any], plugins: Sequence[str]) -> list[str]:
        """What a user would type after `astbench` to serve it, on a free port."""
        options = {} if self.of_run else {k: v for k, v in self.attention.items() if k != "name"}
        given = [] if self.of_run else [f"--attention={self.attention['name']}"]
        given += [f"--attention.{key}={_typed(value)}" for key, value in options.items()]
        given += [f"--{key}={value}" for key, value in serve.items()]
        return ["serve", self.model, *given, *[f"--plugins={p}" for p in plugins], "--port=0", "--drain=1"]


@dataclass(frozen=True)
class Load:
    """Requests of one length.

    Attributes:
        length: Tokens of prompt and answer together; of a document, for `/answer`.
        output: Tokens to write, all of them; 0 for `/answer`.
        requests: How many, at each rate.
        slo: What a good answer is: seconds, or with `_times` multiples of what the reference takes alone.
    """

    length: int
    output: int
    requests: int
    slo: Mapping[str, float]

    def objective(self, alone: Mapping[str, float]) -> Objective:
        """In seconds, after what the reference takes alone."""
        times = {k.removesuffix("_times"): v for k, v in self.slo.items() if k.endswith("_times")}
        plain = {key: value for key, value in self.slo.items() if not key.endswith("_times")}
        return Objective(**plain, **{key: round(factor * alone[key], 4) for key, factor in times.items()})


@dataclass(frozen=True)
class Recipe:
    """What a file says.

    Attributes:
        path: The file.
        folder: Holds the cells' folders, `sweep.json` and `logs/`.
        title: Of tables and curves.
        route: Where requests go, one of :data:`PATHS`.
        text: File that prompts and documents are cut from.
        question: Asked about every document.
        servers: In turn; the first is the reference.
        serve: Options of `astbench serve`.
        loads: By length, ascending.
        rates: Ascending.
        of_capacity: Rates are multiples of the reference's capacity at that length, else requests a second.
        good_share: Share of good answers up to which a rate is held.
        timeout: Seconds after which a request has failed.
        seed: Of prompts and arrivals.
    """

    path: Path
    folder: Path
    title: str
    route: str
    text: Path
    question: str
    servers: tuple[Served, ...]
    serve: Mapping[str, Any]
    loads: tuple[Load, ...]
    rates: tuple[float, ...]
    of_capacity: bool
    good_share: float
    timeout: float
    seed: int

    @property
    def reference(self) -> Served:
        """The server that others are compared with."""
        return self.servers[0]

    @property
    def calibrated(self) -> bool:
        """Whether rates or objectives follow from what the reference takes."""
        return self.of_capacity or any(key.endswith("_times") for load in self.loads for key in load.slo)


def read_recipe(path: Path) -> Recipe:
    """A recipe from its file.

    Raises:
        ConfigError: missing, no YAML, or something in it that cannot be; names the field.
        RegistryError: an unknown attention.
    """
    said = _mapping(_read(path), str(path), _KEYS)
    for name in ("model", "text", "servers", "load", "rates", "slo"):
        if said.get(name) is None and not (name == "model" and _each_has_a_model(said)):
            raise ConfigError(f"{path} has no {name}; docs/deploy.md shows what it holds")
    route = said.get("path", PATHS[0])
    if route not in PATHS:
        raise ConfigError(f"{path}: path must be one of {', '.join(PATHS)}, got {shown(route)}")
    rates = _mapping(said["rates"], f"{path}: rates", _RATES)
    if len(rates) != 1:
        raise ConfigError(f"{path}: rates must have one of {' and '.join(_RATES)}, got {', '.join(rates) or 'none'}")
    ((kind, values),) = rates.items()
    steps = sorted(_number(path, f"rates.{kind}", value) for value in _list(path, f"rates.{kind}", values))
    if double := next((rate for rate in steps if steps.count(rate) > 1), None):
        raise ConfigError(f"{path}: rates.{kind} has {double:g} twice")
    slo = _slo(path, "slo", said["slo"], route)
    serve = _mapping(said.get("serve") or {}, f"{path}: serve", _SERVE)
    for key, value in serve.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ConfigError(f"{path}: serve.{key} must be a value that --{key} takes, got {shown(value)}")
    return Recipe(
        path=path,
        folder=Path(_text(path, "folder", said.get("folder", f"runs/{path.stem}"))),
        title=_text(path, "title", said.get("title", path.stem)),
        route=route,
        text=Path(_text(path, "text", said["text"])),
        question=_text(path, "question", said.get("question", "What is it about?")),
        servers=_servers(path, said),
        serve={"max_batch": 8, "queue": 1000, "timeout": 600, **serve},
        loads=_loads(path, said["load"], route, slo),
        rates=tuple(steps),
        of_capacity=kind == "of_capacity",
        good_share=_number(path, "good_share", said.get("good_share", 0.9), most=1.0),
        timeout=_number(path, "client_timeout", said.get("client_timeout", 600)),
        seed=_whole(path, "seed", said.get("seed", 0), least=0),
    )


def _read(path: Path) -> Any:
    try:
        return plain_yaml(read_text(path))
    except DataError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error


def _each_has_a_model(said: Mapping[str, Any]) -> bool:
    servers = said.get("servers")
    return isinstance(servers, dict) and all(isinstance(one, dict) and "model" in one for one in servers.values())


def _servers(path: Path, said: Mapping[str, Any]) -> tuple[Served, ...]:
    servers = said["servers"]
    if not isinstance(servers, dict) or not servers:
        raise ConfigError(f"{path}: servers must be a mapping of names to servers, got {shown(servers)}")
    found = []
    for name, one in servers.items():
        where = f"{path}: servers.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_.]*[A-Za-z0-9_]", str(name)) or str(name) in _TAKEN:
            raise ConfigError(f"{path}: servers: {shown(name)} cannot be the name of a folder; take another")
        given = _mapping(one, where, _OF_SERVER)
        model = _text(path, f"servers.{name}.model", given.get("model", said.get("model")))
        trained = Path(model).expanduser() / "config.yaml"
        if of_run := trained.is_file():
            if "attention" in given:
                raise ConfigError(f"{where}: a run is served as it was trained, and takes no attention")
            attention = _mapping(_read(trained), str(trained), None).get("attention")
        else:
            attention = given.get("attention")
        attention = {"name": attention} if isinstance(attention, str) else attention
        if not isinstance(attention, dict) or not isinstance(attention.get("name"), str):
            raise ConfigError(
                f"{where} has no attention, and {model} is no run of `astbench fit` that brings one; name one, such as "
                "attention: {name: ast, block_size: 64}"
            )
        attention = current_names(attention)
        try:
            make_config(attention["name"], {key: value for key, value in attention.items() if key != "name"})
        except RegistryError:
            raise
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        found.append(Served(str(name), model, attention, of_run))
    return tuple(found)


def _loads(path: Path, said: Any, route: str, slo: Mapping[str, float]) -> tuple[Load, ...]:
    found = []
    for number, one in enumerate(_list(path, "load", said)):
        where = f"load[{number}]"
        given = _mapping(one, f"{path}: {where}", _OF_LOAD)
        if "length" not in given or "requests" not in given:
            raise ConfigError(f"{path}: {where} needs length and requests")
        output = 0
        if route == PATHS[0]:
            output = _whole(path, f"{where}.output", given.get("output", 16), least=1)
        elif "output" in given:
            raise ConfigError(f"{path}: {where}.output is for {PATHS[0]}; {route} writes no tokens")
        length = _whole(path, f"{where}.length", given["length"], least=output + 1)
        requests = _whole(path, f"{where}.requests", given["requests"], least=1)
        own = _slo(path, f"{where}.slo", given["slo"], route) if "slo" in given else slo
        if output == 1 and any(key.startswith("tpot") for key in own):
            raise ConfigError(f"{path}: {where}.output must be at least 2 where slo asks for a time a token (tpot)")
        found.append(Load(length, output, requests, own))
    lengths = [load.length for load in found]
    if double := next((n for n in lengths if lengths.count(n) > 1), None):
        raise ConfigError(f"{path}: load has the length {double} twice")
    return tuple(sorted(found, key=lambda load: load.length))


def _slo(path: Path, where: str, said: Any, route: str) -> dict[str, float]:
    """Seconds or multiples by name; `/answer` has a latency and no tokens."""
    known = _SLO if route == PATHS[0] else _SLO[:2]
    given = _mapping(said, f"{path}: {where}", known)
    if not given:
        raise ConfigError(f"{path}: {where} must ask for something: some of {', '.join(known)}")
    for name in ("latency", "ttft", "tpot"):
        if name in given and f"{name}_times" in given:
            raise ConfigError(f"{path}: {where} has {name} and {name}_times; take one of them")
    return {key: _number(path, f"{where}.{key}", value) for key, value in given.items()}


def _mapping(data: Any, where: str, known: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping with some of {', '.join(known or ())}, got {shown(data)}")
    for key in data if known is not None else ():
        if key not in (known or ()):
            raise ConfigError(f"{where} takes no {shown(key)}; it takes {', '.join(known or ())}")
    return data


def _list(path: Path, where: str, data: Any) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{path}: {where} must be a list with something in it, got {shown(data)}")
    return data


def _text(path: Path, where: str, data: Any) -> str:
    if not isinstance(data, str) or not data.strip() or "\0" in data:
        raise ConfigError(f"{path}: {where} must be text, got {shown(data)}")
    return data


def _number(path: Path, where: str, data: Any, most: float = 1e6) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float) or not 0 < data <= most:
        raise ConfigError(f"{path}: {where} must be a number above 0 and at most {most:g}, got {shown(data)}")
    return float(data)


def _whole(path: Path, where: str, data: Any, least: int) -> int:
    if isinstance(data, bool) or not isinstance(data, int) or not least <= data <= 10**6:
        raise ConfigError(f"{path}: {where} must be a whole number of at least {least}, got {shown(data)}")
    return data


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
