"""Names to attention classes: the built-in table, installed packages, loose files. Imports no torch.

Three sources, in this order:

1. the table of built-ins (:mod:`astbench_registry.table`);
2. installed packages that declare the entry-point group `astbench.attention`
   (`mine = "my_package.attention:MyAttention"`); loaded only when their name is used, so that a broken one
   hurts nobody else;
3. plugins named on the command line (`--plugins=./mine.py`, `--plugins=my_package.attention`,
   `--attention=./mine.py:MyAttention`), whose classes carry `@register_attention`.

Plugins are code: loading one runs it (:mod:`astbench_registry.plugins`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from astbench_registry.capabilities import AttentionConfig, Capabilities
from astbench_registry.class_table import ClassTable, Registered
from astbench_registry.errors import PluginError, UnknownAttentionError
from astbench_registry.name_table import did_you_mean
from astbench_registry.plugins import import_plugin
from astbench_registry.table import BUILTIN

if TYPE_CHECKING:
    from astbench_registry.interface import Attention, AttentionShape

ENTRY_POINT_GROUP = "astbench.attention"

T = TypeVar("T", bound="type[Attention]")


_names = ClassTable("attention", ENTRY_POINT_GROUP, BUILTIN, UnknownAttentionError)


def register_attention(name: str, config: type[AttentionConfig]) -> Callable[[T], T]:
    """Class decorator: make `name` available as `--attention=name`.

    Args:
        name: Lower-case letters, digits, `_` and `-`.
        config: Frozen dataclass derived from :class:`AttentionConfig`; every field has a default.

    Raises:
        PluginError: a name that is taken (by whom), or a class or config of the wrong kind.
    """

    def register(cls: T) -> T:
        from astbench_registry.interface import Attention

        source = _names.source_of(name, cls)
        what = f"attention '{name}' from {source}"
        if not (isinstance(cls, type) and issubclass(cls, Attention)):
            raise PluginError(f"{what} must be a subclass of astbench_registry.Attention")
        if "forward" not in vars(cls) and cls.forward is Attention.forward:
            raise PluginError(f"{what} does not implement forward()")
        _names.check_config(what, config, AttentionConfig)
        if not isinstance(getattr(config, "capabilities", None), Capabilities):
            raise PluginError(f"{what}: its config must set `capabilities = Capabilities(...)`")
        _names.enter(name, source, cls, config)
        return cls

    return register


def registered() -> dict[str, Registered]:
    """Every name that can be asked for, sorted, without importing anybody's code.

    Two installed packages that claim one name are both left out here (:func:`clashes` names them).
    """
    return _names.rows()


def clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    return _names.clashes()


def load_plugin(target: str) -> list[str]:
    """Import a plugin, `path/to/file.py` or `package.module`, and return the names it registered.

    Raises:
        PluginError: the file is missing, raises at import, or registers nothing.
    """
    names = attentions_of(target, import_plugin(target))
    if not names:
        raise PluginError(f"plugin {target} registers no attention; decorate a class with @register_attention")
    return names


def attentions_of(target: str, module: ModuleType) -> list[str]:
    """Names that a plugin registered, itself or through what it imported."""
    return _names.registered_by(target, module)


def config_class(name: str) -> type[AttentionConfig]:
    """The options of an attention; for built-ins without importing torch.

    Raises:
        UnknownAttentionError: with the nearest name and all registered ones.
        PluginError: when the plugin that supplies it does not load.
    """
    return _names.config_class(name)


def attention_class(name: str) -> type[Attention]:
    """The class of an attention, imported now. Raises as :func:`config_class`."""
    return _names.class_of(name)


def build_attention(name: str, options: Mapping[str, Any] | AttentionConfig, shape: AttentionShape) -> Attention:
    """Build an attention module for one layer from plain options.

    Raises:
        ValueError: an option that does not exist or holds a bad value, by name.
    """
    config = options if isinstance(options, AttentionConfig) else make_config(name, options)
    cls = attention_class(name)
    attention: Attention = _names.build(name, lambda: cls(config, shape))
    return attention


def make_config(name: str, options: Mapping[str, Any]) -> AttentionConfig:
    """Plain options to the variant's frozen dataclass. Raises as :func:`build_attention`."""
    cls = config_class(name)
    options = cls.current(options)
    check_options(f"attention '{name}'", "attention", cls, options)
    return cls(**options)


def check_options(what: str, group: str, cls: type[Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a dataclass does not have, and values that are not of their types.

    Args:
        what: Whose they are, for messages.
        group: Before the dot of their flags.
        cls: The dataclass.
        options: Plain data.

    Raises:
        ValueError: by the option's name.
    """
    known = [f.name for f in fields(cls)]
    types = option_types(cls)
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"{what} has no option '{option}'{hint} options: {', '.join(known) or 'none'}")
        if not _finite(value):
            raise ValueError(f"--{group}.{option} must be a finite number, got {value}")
        if not _of_type(value, types.get(option, Any)):
            raise ValueError(f"--{group}.{option} must be {type_name(types[option])}, got {value!r}")


def current_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """An attention's options, `name` among them, as a record or checkpoint holds them, under their names of today."""
    name = options.get("name")
    known = name is not None and ":" not in str(name) and name in registered()
    return config_class(str(name)).current(options) if known else dict(options)


def option_types(cls: type[Any]) -> dict[str, Any]:
    """Types of the options by name; empty where a plugin's annotation is imported for type checkers only."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _finite(value: Any) -> bool:
    """No infinity and no NaN among the numbers of a value."""
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _of_type(value: Any, hint: Any) -> bool:
    """Plain types, literals, unions and lists of them; what else a variant declares is its own to check."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (Union, UnionType):
        return any(_of_type(value, part) for part in parts)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_of_type(v, parts[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def type_name(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
