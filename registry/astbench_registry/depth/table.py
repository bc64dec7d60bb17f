"""The table: every built-in depth policy, its options and where its code is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from astbench_registry.depth.config import DepthConfig
from astbench_registry.depth.configs.early_exit import EarlyExitConfig
from astbench_registry.depth.configs.random_paths import RandomConfig
from astbench_registry.depth.configs.static import StaticConfig
from astbench_registry.depth.configs.transformer_inverse import TransformerInverseConfig


@dataclass(frozen=True)
class Row:
    """One line of the table: the code (`module:Class`) and the options."""

    target: str
    config: type[DepthConfig]


_HERE = "astbench_registry.depth"

BUILTIN: dict[str, Row] = {
    "early_exit": Row(f"{_HERE}.early_exit:EarlyExit", EarlyExitConfig),
    "random": Row(f"{_HERE}.random_paths:RandomPaths", RandomConfig),
    "static": Row(f"{_HERE}.static:Static", StaticConfig),
    "transformer_inverse": Row(f"{_HERE}.transformer_inverse:TransformerInverse", TransformerInverseConfig),
}
