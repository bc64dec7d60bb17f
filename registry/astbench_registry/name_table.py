"""The names of one kind of plugin: the built-in ones, those of installed packages, those of loose files.

Attentions, transforms and tasks each have such a table; what a row holds is their own. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from astbench_registry.errors import PluginError
from astbench_registry.plugins import (
    check_name,
    claimed_by,
    clashes_in,
    entry_points,
    entry_source,
    import_plugin,
    load_entry_point,
    one_line,
    roll_back,
    running_plugin,
    sole_entry_point,
)


class NamedRow(Protocol):
    """What every kind's row has.

    Attributes:
        source: "astbench", a distribution's name, or a plugin's path.
        target: `module:Class`.
    """

    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102


R = TypeVar("R", bound=NamedRow)


class NameTable(Generic[R]):
    """Names of one kind, from three sources: built-ins, then entry points of installed packages, then plugins.

    Entry points are loaded only when their name is used, so that a broken one hurts nobody else.

    Args:
        kind: What is named, in messages: "attention".
        group: Entry-point group of installed packages: "astbench.attention".
        builtin: Makes the row of a built-in name; its keys are those names.
        installed: Makes the row of an entry point that is not loaded, from its name, source and target.
        unknown: The error for a name that nobody has.
        alphabetical: Whether names are listed so; else built-ins stand first, as their table has them.

    Attributes:
        decorated: Rows of loaded plugins, by name.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Mapping[str, Callable[[], R]],
        installed: Callable[[str, str, str], R],
        unknown: type[Exception],
        *,
        alphabetical: bool = True,
    ) -> None:
        self.kind, self.group, self.builtin = kind, group, builtin
        self._installed, self._unknown, self._alphabetical = installed, unknown, alphabetical
        self.decorated: dict[str, R] = {}
        roll_back(lambda: self.decorated)

    @property
    def decorator(self) -> str:
        """Name of the decorator that plugins use."""
        return f"@register_{self.kind}"

    def source_of(self, name: str, cls: type[Any]) -> str:
        """Where a class that asks for a name comes from.

        Raises:
            PluginError: the name could not be typed.
        """
        source = running_plugin() or cls.__module__
        check_name(self.kind, name, source)
        return source

    def add(self, name: str, row: R) -> None:
        """Enter a plugin's row.

        Raises:
            PluginError: another source has the name.
        """
        taken = self._taken_by(name)
        if taken and taken != row.source:
            raise PluginError(f"{self.kind} '{name}' is registered twice: by {taken} and by {row.source}; rename one")
        self.decorated[name] = row

    def _taken_by(self, name: str) -> str | None:
        if name in self.builtin:
            return "astbench"
        if name in self.decorated:
            return self.decorated[name].source
        return claimed_by(self.group, name)

    def rows(self) -> dict[str, R]:
        """Every name that can be asked for, without importing anybody's code.

        Two installed packages that claim one name are both left out here (:meth:`clashes` names them).
        """
        found = {name: make() for name, make in self.builtin.items()}
        for name, eps in sorted(entry_points(self.group).items()):
            if name not in found and len(eps) == 1:
                found[name] = self._installed(name, entry_source(eps[0]), eps[0].value)
        found.update(self.decorated)
        return dict(sorted(found.items())) if self._alphabetical else found

    def clashes(self) -> dict[str, list[str]]:
        """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
        return clashes_in(self.group, self.builtin)

    def registered_by(self, target: str, module: ModuleType) -> list[str]:
        """Names that a plugin registered, itself or through what it imported."""
        own = f"{module.__name__}:"
        rows = self.decorated.items()
        return sorted(name for name, row in rows if row.source == target or row.target.startswith(own))

    def of_class(self, reference: str) -> str:
        """The name under which `./mine.py:Mine` registers that class; loads the plugin.

        Raises:
            PluginError: it does not load, or registers no such class.
        """
        target, _, attribute = reference.rpartition(":")
        wanted = getattr(import_plugin(target), attribute, None)
        if isinstance(wanted, type):
            address = f"{wanted.__module__}:{wanted.__qualname__}"
            for name, row in self.decorated.items():
                if row.target == address:
                    return name
        raise PluginError(f"{reference}: no class '{attribute}' with {self.decorator} in {target}")

    def load(self, name: str) -> R:
        """The row of a plugin; an installed package's is imported now.

        Raises:
            PluginError: it does not load, or does not register the name.
            Exception: the table's own error for an unknown name, with the nearest and all of them.
        """
        if name in self.decorated:
            return self.decorated[name]
        ep = sole_entry_point(self.kind, self.group, name)
        if ep is None:
            raise self._unknown(unknown_name(self.kind, name, list(self.rows())))
        self._load(name, ep)
        return self.decorated[name]

    def _load(self, name: str, ep: EntryPoint) -> None:
        cls = load_entry_point(self.kind, ep)
        if getattr(cls, "name", name) != name or name not in self.decorated:
            raise PluginError(
                f"{self.kind} '{name}' from {entry_source(ep)}: {ep.value} must carry {self.decorator}('{name}', ...)"
            )

    def build(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` builds; whatever a plugin raises is reported under its name.

        Raises:
            ValueError: an option that does not go with what it is built for.
            PluginError: any other error of a plugin.
        """
        if name in self.builtin:
            return make()
        try:
            return make()
        except ValueError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self.kind} '{name}' from {self.load(name).source} cannot be built: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'ast'?` where a known name is near, else `;`."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ";"


def unknown_name(kind: str, name: str, known: Collection[str]) -> str:
    """The message about a name that nobody has."""
    return f"unknown {kind} '{name}'{did_you_mean(name, known)} registered: {', '.join(known)}"


def require_defaults(what: str, config: type[Any]) -> None:
    """Refuse a dataclass of options in which one has no default.

    Raises:
        PluginError: naming them.
    """
    missing = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise PluginError(f"{what}: config fields without a default: {missing}")
