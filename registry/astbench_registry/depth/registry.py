"""Names to depth policies: the built-in table, installed packages, loose files. Imports no torch.

Three sources, as of attentions (:mod:`astbench_registry.registry`): the table; installed packages that declare the
entry-point group `astbench.depth`; and plugins, whose classes carry `@register_depth`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from astbench_registry.class_table import ClassTable, Registered
from astbench_registry.depth.config import DepthConfig
from astbench_registry.depth.table import BUILTIN
from astbench_registry.errors import PluginError, UnknownDepthError
from astbench_registry.registry import check_options

if TYPE_CHECKING:
    from astbench_registry.depth.interface import DepthPolicy, StackShape

ENTRY_POINT_GROUP = "astbench.depth"

T = TypeVar("T", bound="type[DepthPolicy]")


_names = ClassTable("depth", ENTRY_POINT_GROUP, BUILTIN, UnknownDepthError)


def register_depth(name: str, config: type[DepthConfig]) -> Callable[[T], T]:
    """Class decorator: make `name` available as `--depth=name`.

    Args:
        name: Lower-case letters, digits, `_` and `-`.
        config: Frozen dataclass derived from :class:`DepthConfig`; every field has a default.

    Raises:
        PluginError: a name that is taken (by whom), or a class or config of the wrong kind.
    """

    def register(cls: T) -> T:
        from astbench_registry.depth.interface import DepthPolicy

        source = _names.source_of(name, cls)
        what = f"depth '{name}' from {source}"
        if not (isinstance(cls, type) and issubclass(cls, DepthPolicy)):
            raise PluginError(f"{what} must be a subclass of astbench_registry.DepthPolicy")
        if getattr(cls.choose, "__isabstractmethod__", False):
            raise PluginError(f"{what} does not implement choose()")
        _names.check_config(what, config, DepthConfig)
        _names.enter(name, source, cls, config)
        return cls

    return register


def registered_depths() -> dict[str, Registered]:
    """Every name that can be asked for, sorted, without importing anybody's code."""
    return _names.rows()


def depth_clashes() -> dict[str, list[str]]:
    """Names that several claim, with all of them: installed packages, or one and a built-in, which wins."""
    return _names.clashes()


def depths_of(target: str, module: ModuleType) -> list[str]:
    """Names that a plugin registered, itself or through what it imported."""
    return _names.registered_by(target, module)


def depth_of_class(reference: str) -> str:
    """The name under which `./mine.py:Mine` registers that class; loads the plugin.

    Raises:
        PluginError: it does not load, or registers no such class.
    """
    return _names.of_class(reference)


def depth_config_class(name: str) -> type[DepthConfig]:
    """The options of a policy; for built-ins without importing torch.

    Raises:
        UnknownDepthError: with the nearest name and all registered ones.
        PluginError: when the plugin that supplies it does not load.
    """
    return _names.config_class(name)


def depth_class(name: str) -> type[DepthPolicy]:
    """The class of a policy, imported now. Raises as :func:`depth_config_class`."""
    return _names.class_of(name)


def make_depth_config(name: str, options: Mapping[str, Any]) -> DepthConfig:
    """Plain options to the policy's frozen dataclass.

    Raises:
        ValueError: an option that does not exist or holds a bad value, by name.
    """
    cls = depth_config_class(name)
    check_options(f"depth '{name}'", "depth", cls, options)
    return cls(**options)


def build_depth(name: str, options: Mapping[str, Any] | DepthConfig, shape: StackShape) -> DepthPolicy:
    """Build a policy for one model. Raises as :func:`make_depth_config`."""
    config = options if isinstance(options, DepthConfig) else make_depth_config(name, options)
    cls = depth_class(name)
    policy: DepthPolicy = _names.build(name, lambda: cls(config, shape))
    return policy
