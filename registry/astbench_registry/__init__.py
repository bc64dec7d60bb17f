"""First floor of astbench: the attention interface, the registry, one file per variant.

What a variant's author needs is importable from here; torch is loaded only when a name that needs it is used.

>>> from astbench_registry import registered
>>> "ast" in registered()
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from astbench_registry.capabilities import AttentionConfig, Capabilities, Pattern
from astbench_registry.depth.config import DepthConfig
from astbench_registry.depth.registry import register_depth
from astbench_registry.errors import CapabilityError, PluginError, RegistryError, UnknownAttentionError
from astbench_registry.registry import (
    attention_class,
    build_attention,
    config_class,
    load_plugin,
    register_attention,
    registered,
)
from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.registry import register_transform

if TYPE_CHECKING:
    from astbench_registry.depth.interface import Choice, DepthPolicy, Outcome, StackShape
    from astbench_registry.interface import (
        Attention,
        AttentionContext,
        AttentionOutput,
        AttentionShape,
        AttentionStats,
        CacheState,
    )
    from astbench_registry.mask import AttentionMask
    from astbench_registry.transforms.interface import Transform

_LAZY = (
    "Attention",
    "AttentionContext",
    "AttentionOutput",
    "AttentionShape",
    "AttentionStats",
    "CacheState",
)

_DEPTH = ("Choice", "DepthPolicy", "Outcome", "StackShape")

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionContext",
    "AttentionMask",
    "AttentionOutput",
    "AttentionShape",
    "AttentionStats",
    "CacheState",
    "Capabilities",
    "CapabilityError",
    "Choice",
    "DepthConfig",
    "DepthPolicy",
    "Outcome",
    "Pattern",
    "PluginError",
    "RegistryError",
    "StackShape",
    "Transform",
    "TransformConfig",
    "UnknownAttentionError",
    "attention_class",
    "build_attention",
    "config_class",
    "load_plugin",
    "register_attention",
    "register_depth",
    "register_transform",
    "registered",
]


def __getattr__(name: str) -> Any:
    if name == "AttentionMask":
        return import_module("astbench_registry.mask").AttentionMask
    if name == "Transform":
        return import_module("astbench_registry.transforms.interface").Transform
    if name in _DEPTH:
        return getattr(import_module("astbench_registry.depth.interface"), name)
    if name in _LAZY:
        return getattr(import_module("astbench_registry.interface"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
