"""astbench: attention mechanisms compared honestly, and an Adaptive Sparse Transformer.

The door for library users; everything loads on first use:

>>> import astbench
>>> handle = astbench.swap_attention(model, "ast", {"density": 0.25})  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astbench.backbones.adapters import load_adapter, save_adapter
    from astbench.backbones.load import load_backbone
    from astbench.backbones.swap import SwapHandle, swap_attention

__version__ = "0.2.0"

_LAZY = {
    "SwapHandle": "astbench.backbones.swap",
    "load_adapter": "astbench.backbones.adapters",
    "load_backbone": "astbench.backbones.load",
    "save_adapter": "astbench.backbones.adapters",
    "swap_attention": "astbench.backbones.swap",
}

__all__ = ["SwapHandle", "__version__", "load_adapter", "load_backbone", "save_adapter", "swap_attention"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
