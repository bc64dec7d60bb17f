"""Names to transforms: the built-in table, installed packages, loose files. Imports no torch.

Three sources, as of attentions (:mod:`astbench_registry.registry`): the table; installed packages that declare the
entry-point group `astbench.transforms`; and plugins, whose classes carry `@register_transform`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from astbench_registry.errors import CapabilityError, PluginError, UnknownTransformError
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
from astbench_registry.registry import check_options, registered
from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.table import BUILTIN

if TYPE_CHECKING:
    from astbench_registry.interface import AttentionShape
    from astbench_registry.transforms.interface import Transform

ENTRY_POINT_GROUP = "astbench.transforms"

T = TypeVar("T", bound="type[Transform]")


@dataclass(frozen=True)
class RegisteredTransform:
    """One name: where it comes from and, once loaded or built in, its options.

    Attributes:
        name: What `--transform` takes.
        source: "astbench", a distribution's name, or a plugin's path.
        target: `module:Class`.
        config: The options' class; None for an entry point not loaded yet.
        cls: The transform's class; None until loaded.
    """

    name: str
    source: str
    target: str
    config: type[TransformConfig] | None = None
    cls: type[Transform] | None = None

    @property
    def summary(self) -> str:
        """First line of the options' docstring."""
        return (self.config.__doc__ or "").strip().partition("\n")[0] if self.config else "(not loaded)"


_decorated: dict[str, RegisteredTransform] = {}
roll_back(lambda: _decorated)


def register_transform(name: str, config: type[TransformConfig]) -> Callable[[T], T]:
    """Class decorator: make `name` available as `--transform=name`.

    Args:
        name: Lower-case letters, digits, `_` and `-`.
        config: Frozen dataclass derived from :class:`TransformConfig`; every field has a default.

    Raises:
        PluginError: a name that is taken (by whom), or a class or config of the wrong kind.
    """

    def register(cls: T) -> T:
        from astbench_registry.transforms.interface import Transform

        source = running_plugin() or cls.__module__
        check_name("transform", name, source)
        what = f"transform '{name}' from {source}"
        if not (isinstance(cls, type) and issubclass(cls, Transform)):
            raise PluginError(f"{what} must be a subclass of astbench_registry.Transform")
        if getattr(cls.__call__, "__isabstractmethod__", False):
            raise PluginError(f"{what} does not implement __call__()")
        if not (isinstance(config, type) and issubclass(config, TransformConfig) and is_dataclass(config)):
            raise PluginError(f"{what}: its config must be a dataclass of TransformConfig")
        missing = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
        if missing:
            raise PluginError(f"{what}: config fields without a default: {missing}")
        taken = _taken_by(name)
        if taken and taken != source:
            raise PluginError(f"transform '{name}' is registered twice: by {taken} and by {source}; rename one")
        cls.config_class, cls.name = config, name
        _decorated[name] = RegisteredTransform(name, source, f"{cls.__module__}:{cls.__qualname__}", config, cls)
        return cls

    return register


def _taken_by(name: str) -> str | None:
    if name in BUILTIN:
        return "astbench"
    if name in _decorated:
        return _decorated[name].source
    return claimed_by(ENTRY_POINT_GROUP, name)


def registered_transforms() -> dict[str, RegisteredTransform]:
    """Every name that can be asked for, sorted, without importing anybody's code."""
    found = {name: RegisteredTransform(name, "astbench", row.target, row.config) for name, row in BUILTIN.items()}
    for name, eps in entry_points(ENTRY_POINT_GROUP).items():
        if name not in found and len(eps) == 1:
            found[name] = RegisteredTransform(name, entry_source(eps[0]), eps[0].value)
    found.update(_decorated)
    return dict(sorted(found.items()))


def transform_clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    return clashes_in(ENTRY_POINT_GROUP, BUILTIN)


def transforms_of(target: str, module: ModuleType) -> list[str]:
    """Names that a plugin registered, itself or through what it imported."""
    own = f"{module.__name__}:"
    return sorted(name for name, row in _decorated.items() if row.source == target or row.target.startswith(own))


def transform_of_class(reference: str) -> str:
    """The name under which `./mine.py:Mine` registers that class; loads the plugin.

    Raises:
        PluginError: it does not load, or registers no such class.
    """
    target, _, cls = reference.rpartition(":")
    wanted = getattr(import_plugin(target), cls, None)
    for name, row in _decorated.items():
        if row.cls is wanted is not None:
            return name
    raise PluginError(f"{reference}: no class '{cls}' with @register_transform in {target}")


def transform_config_class(name: str) -> type[TransformConfig]:
    """The options of a transform; for built-ins without importing torch.

    Raises:
        UnknownTransformError: with the nearest name and all registered ones.
        PluginError: when the plugin that supplies it does not load.
    """
    if name in BUILTIN:
        return BUILTIN[name].config
    config = _load(name).config
    assert config is not None, f"{name} was loaded without a config"
    return config


def transform_class(name: str) -> type[Transform]:
    """The class of a transform, imported now. Raises as :func:`transform_config_class`."""
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].target.partition(":")
        cls: type[Transform] = getattr(importlib.import_module(module), attribute)
        cls.config_class, cls.name = BUILTIN[name].config, name
        return cls
    loaded = _load(name).cls
    assert loaded is not None, f"{name} was loaded without a class"
    return loaded


def make_transform_config(name: str, options: Mapping[str, Any]) -> TransformConfig:
    """Plain options to the transform's frozen dataclass.

    Raises:
        ValueError: an option that does not exist or holds a bad value, by name.
    """
    cls = transform_config_class(name)
    check_options(f"transform '{name}'", "transform", cls, options)
    return cls(**options)


def build_transform(name: str, options: Mapping[str, Any] | TransformConfig, shape: AttentionShape) -> Transform:
    """Build a transform for one layer. Raises as :func:`make_transform_config`."""
    config = options if isinstance(options, TransformConfig) else make_transform_config(name, options)
    cls = transform_class(name)
    if name in BUILTIN:
        return cls(config, shape)
    try:
        return cls(config, shape)
    except ValueError:
        raise  # an option that does not go with this layer
    except Exception as error:  # whatever a plugin raises is reported under its name
        raise PluginError(
            f"transform '{name}' from {_load(name).source} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error


def require_probabilities(attention: str, *, able: bool, what: str) -> None:
    """Refuse an attention whose weights nobody can change or look at.

    Args:
        attention: Its name.
        able: Whether it yields probabilities with its options.
        what: Who asks, for the message: `--transform=log3bit`.

    Raises:
        CapabilityError: with the attentions that can.
    """
    if able:
        return
    names = attentions_with_probabilities()
    if attention in names:
        raise CapabilityError(
            f"{what} needs explicit weights, which attention '{attention}' has with its default options and not with "
            "these: other tokens join its softmax, or gates or projections change it"
        )
    raise CapabilityError(
        f"{what} needs explicit weights, which attention '{attention}' does not yield; these do: {', '.join(names)}"
    )


def attentions_with_probabilities() -> list[str]:
    """Names of the attentions that yield probabilities with their default options; installed ones are not loaded."""
    found = {name: row.config for name, row in registered().items() if row.config is not None}
    return [name for name, config in found.items() if config().can.yields_probabilities]


def _load(name: str) -> RegisteredTransform:
    if name in _decorated:
        return _decorated[name]
    ep = sole_entry_point("transform", ENTRY_POINT_GROUP, name)
    if ep is None:
        names = list(registered_transforms())
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        raise UnknownTransformError(f"unknown transform '{name}'{hint} registered: {', '.join(names)}")
    cls = load_entry_point("transform", ep)
    if getattr(cls, "name", None) != name or name not in _decorated:
        raise PluginError(
            f"transform '{name}' from {entry_source(ep)}: {ep.value} must carry @register_transform('{name}', ...)"
        )
    return _decorated[name]
