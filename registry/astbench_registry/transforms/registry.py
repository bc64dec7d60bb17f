"""Names to transforms: the built-in table, installed packages, loose files. Imports no torch.

Three sources, as of attentions (:mod:`astbench_registry.registry`): the table; installed packages that declare the
entry-point group `astbench.transforms`; and plugins, whose classes carry `@register_transform`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from astbench_registry.class_table import ClassTable, Registered
from astbench_registry.errors import CapabilityError, PluginError, UnknownTransformError
from astbench_registry.registry import check_options, registered
from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.table import BUILTIN

if TYPE_CHECKING:
    from astbench_registry.interface import AttentionShape
    from astbench_registry.transforms.interface import Transform

ENTRY_POINT_GROUP = "astbench.transforms"

T = TypeVar("T", bound="type[Transform]")


_names = ClassTable("transform", ENTRY_POINT_GROUP, BUILTIN, UnknownTransformError)


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

        source = _names.source_of(name, cls)
        what = f"transform '{name}' from {source}"
        if not (isinstance(cls, type) and issubclass(cls, Transform)):
            raise PluginError(f"{what} must be a subclass of astbench_registry.Transform")
        if getattr(cls.__call__, "__isabstractmethod__", False):
            raise PluginError(f"{what} does not implement __call__()")
        _names.check_config(what, config, TransformConfig)
        _names.enter(name, source, cls, config)
        return cls

    return register


def registered_transforms() -> dict[str, Registered]:
    """Every name that can be asked for, sorted, without importing anybody's code."""
    return _names.rows()


def transform_clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    return _names.clashes()


def transforms_of(target: str, module: ModuleType) -> list[str]:
    """Names that a plugin registered, itself or through what it imported."""
    return _names.registered_by(target, module)


def transform_of_class(reference: str) -> str:
    """The name under which `./mine.py:Mine` registers that class; loads the plugin.

    Raises:
        PluginError: it does not load, or registers no such class.
    """
    return _names.of_class(reference)


def transform_config_class(name: str) -> type[TransformConfig]:
    """The options of a transform; for built-ins without importing torch.

    Raises:
        UnknownTransformError: with the nearest name and all registered ones.
        PluginError: when the plugin that supplies it does not load.
    """
    return _names.config_class(name)


def transform_class(name: str) -> type[Transform]:
    """The class of a transform, imported now. Raises as :func:`transform_config_class`."""
    return _names.class_of(name)


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
    transform: Transform = _names.build(name, lambda: cls(config, shape))
    return transform


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
