"""Names of classes that have options: what the registries of attentions, transforms and depth policies share.

Imports no torch: built-in classes are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

from astbench_registry.errors import PluginError
from astbench_registry.name_table import NameTable, require_defaults


@dataclass(frozen=True)
class Row:
    """One line of a table of what is built in: the code (`module:Class`) and its options."""

    target: str
    config: type[Any]


@dataclass(frozen=True)
class Registered:
    """One name: where it comes from and, once loaded or built in, its options.

    Attributes:
        name: What `--attention`, `--transform` or `--depth` takes.
        source: "astbench", a distribution's name, or a plugin's path.
        target: `module:Class`.
        config: The options' class; None for an entry point not loaded yet.
        cls: The class itself; None until loaded.
    """

    name: str
    source: str
    target: str
    config: type[Any] | None = None
    cls: type[Any] | None = None

    @property
    def summary(self) -> str:
        """First line of the options' docstring."""
        return (self.config.__doc__ or "").strip().partition("\n")[0] if self.config else "(not loaded)"


class ClassTable(NameTable[Registered]):
    """Names of one kind of class.

    Args:
        kind: What is named, in messages: "attention".
        group: Entry-point group of installed packages: "astbench.attention".
        table: The built-in ones.
        unknown: The error for a name that nobody has.
    """

    def __init__(self, kind: str, group: str, table: Mapping[str, Row], unknown: type[Exception]) -> None:
        rows = {name: partial(Registered, name, "astbench", row.target, row.config) for name, row in table.items()}
        super().__init__(kind, group, rows, Registered, unknown)
        self.table = table

    def load(self, name: str) -> Registered:
        """The row of a plugin, which may be named by its class: `./mine.py:Mine`, `package.module:Mine`.

        Raises:
            PluginError: a file without a class; and as the base class.
        """
        if name.endswith(".py"):
            raise PluginError(f"{self.kind} {name} names a file; name the class in it too: {name}:CLASS")
        return super().load(self.of_class(name) if ".py:" in name or (":" in name and "." in name) else name)

    def check_config(self, what: str, config: type[Any], base: type[Any]) -> None:
        """Refuse options of the wrong kind, or without defaults.

        Raises:
            PluginError: naming what they are of, and the fields.
        """
        if not (isinstance(config, type) and issubclass(config, base) and is_dataclass(config)):
            raise PluginError(f"{what}: its config must be a dataclass of {base.__name__}")
        require_defaults(what, config)

    def enter(self, name: str, source: str, cls: type[Any], config: type[Any]) -> None:
        """Register a class with its options.

        Raises:
            PluginError: another source has the name.
        """
        self.add(name, Registered(name, source, f"{cls.__module__}:{cls.__qualname__}", config, cls))
        cls.config_class, cls.name = config, name

    def config_class(self, name: str) -> type[Any]:
        """The options of a name; of built-in ones without importing their code. Raises as :meth:`load`."""
        if name in self.table:
            return self.table[name].config
        config = self.load(name).config
        assert config is not None, f"{name} was loaded without a config"
        return config

    def class_of(self, name: str) -> type[Any]:
        """The class of a name, imported now. Raises as :meth:`load`."""
        if name in self.table:
            row = self.table[name]
            module, _, attribute = row.target.partition(":")
            cls: type[Any] = getattr(importlib.import_module(module), attribute)
            cls.config_class, cls.name = row.config, name
            return cls
        loaded = self.load(name).cls
        assert loaded is not None, f"{name} was loaded without a class"
        return loaded
