"""Running plugins, each under its own name: loose files, modules, and entry points of installed packages.

What plugins register stands in other modules' tables (attentions in :mod:`astbench_registry.registry`, tasks in
astbench). They take from here what is alike. Imports no torch. Plugins are code: loading one runs it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os.path
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from astbench_registry.errors import PluginError

_loading: list[str] = []  # the plugin whose code is running, innermost last
_tables: list[Callable[[], dict[str, Any]]] = []


def roll_back(table: Callable[[], dict[str, Any]]) -> None:
    """Have a table that plugins write into put back as it was whenever a plugin raises.

    Args:
        table: Gives the table in use.
    """
    _tables.append(table)


def check_name(kind: str, name: str, source: str) -> None:
    """Refuse a name that could not be typed as an option's value.

    Raises:
        PluginError: it holds something else than lower-case letters, digits, `_` and `-`.
    """
    if not name or not name.replace("_", "").replace("-", "").isalnum() or name != name.lower():
        raise PluginError(f"{kind} name {name!r} from {source}: use lower-case letters, digits, _ and -")


def plugin_key(target: str) -> str:
    """What tells plugins apart: the file that a path leads to (`relu.py` and `./relu.py` are one), or the module."""
    return os.path.realpath(os.path.expanduser(target)) if target.endswith(".py") else target


def running_plugin() -> str | None:
    """The plugin whose code is running, the innermost; None outside of plugins."""
    return _loading[-1] if _loading else None


def entry_points(group: str) -> dict[str, list[metadata.EntryPoint]]:
    """Installed packages' entry points of a group by name."""
    return _entry_points(group, tuple(sys.path))


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, list[metadata.EntryPoint]]:
    """Looked for once for every import path: it takes a tenth of a second, and names are asked for by the thousand."""
    claims: dict[str, list[metadata.EntryPoint]] = {}
    for ep in metadata.entry_points(group=group):
        claims.setdefault(ep.name, []).append(ep)
    return claims


def entry_source(ep: metadata.EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return ep.dist.name if ep.dist else "an installed package"


def claimed_by(group: str, name: str) -> str | None:
    """The installed package that declares a name in a group, the first one."""
    # While an installed plugin loads, its own entry point is not a clash.
    others = [source for ep in entry_points(group).get(name, []) if (source := entry_source(ep)) not in _loading]
    return others[0] if others else None


def clashes_in(group: str, builtin: Collection[str]) -> dict[str, list[str]]:
    """Names that several claim: installed packages, or one and a table of built-ins (`astbench`), which wins."""
    claimed = {name: [entry_source(ep) for ep in eps] for name, eps in entry_points(group).items()}
    for name in claimed.keys() & set(builtin):
        claimed[name].insert(0, "astbench")
    return {name: sorted(sources) for name, sources in sorted(claimed.items()) if len(sources) > 1}


def sole_entry_point(kind: str, group: str, name: str) -> metadata.EntryPoint | None:
    """The entry point of a name; None when no installed package declares it.

    Raises:
        PluginError: two packages do.
    """
    eps = entry_points(group).get(name, [])
    if len(eps) > 1:
        sources = " and by ".join(sorted(map(entry_source, eps)))
        raise PluginError(f"{kind} '{name}' is registered twice: by {sources}; uninstall one")
    return eps[0] if eps else None


@contextmanager
def _running(source: str) -> Iterator[None]:
    """Whatever registers meanwhile comes from `source`; when it raises, nothing of it stays in any table."""
    before = [(table(), dict(table())) for table in _tables]
    _loading.append(source)
    try:
        yield
    except BaseException:
        for table, rows in before:
            table.clear()
            table.update(rows)
        raise
    finally:
        _loading.pop()


def load_entry_point(kind: str, ep: metadata.EntryPoint) -> Any:
    """Import what an entry point names; what registers meanwhile comes from its package.

    Raises:
        PluginError: it does not load; nothing that it registered stays.
    """
    try:
        with _running(entry_source(ep)):
            return ep.load()
    except (PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a plugin raises is reported under its name
        raise PluginError(
            f"{kind} '{ep.name}' from {entry_source(ep)} ({ep.value}) does not load: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def import_plugin(target: str) -> ModuleType:
    """Run a plugin, `path/to/file.py` or `package.module`; what it registers carries `target` as its source.

    Raises:
        PluginError: the file is missing or raises at import; nothing that it registered stays.
    """
    try:
        with _running(target):
            return _import(target)
    except (PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a plugin raises is reported under its name
        raise PluginError(f"plugin {target} does not load: {type(error).__name__}: {one_line(error)}") from error


def _import(target: str) -> ModuleType:
    if not target.endswith(".py"):
        if target.startswith(".") or "/" in target:
            raise PluginError(f"plugin {target} is no file that ends in .py, and no module's name")
        return importlib.import_module(target)
    path = Path(plugin_key(target))
    if not path.is_file():
        raise PluginError(f"plugin file {target} does not exist")
    name = f"astbench_plugin_{path.stem}_{zlib.crc32(str(path).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {target} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def code_facts(source: str, module: str) -> dict[str, str]:
    """What tells one version of a plugin's code from another: its file's sha256, and its package's version.

    Args:
        source: File, module or installed package.
        module: Name of the module that was loaded from it.
    """
    facts = {"plugin": source}
    file = getattr(sys.modules.get(module), "__file__", None)
    if file:
        facts["sha256"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    if not source.endswith(".py"):
        package = metadata.packages_distributions().get(module.partition(".")[0], [source])[0]
        with suppress(metadata.PackageNotFoundError):  # a module beside the current folder is of no package
            facts |= {"package": package, "version": metadata.version(package)}
    return facts


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
