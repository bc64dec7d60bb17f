"""The table: every built-in depth policy, its options and where its code is. Imports no torch."""

from __future__ import annotations

from astbench_registry.class_table import Row
from astbench_registry.depth.configs.early_exit import EarlyExitConfig
from astbench_registry.depth.configs.random_paths import RandomConfig
from astbench_registry.depth.configs.static import StaticConfig
from astbench_registry.depth.configs.transformer_inverse import TransformerInverseConfig

_HERE = "astbench_registry.depth"

BUILTIN: dict[str, Row] = {
    "early_exit": Row(f"{_HERE}.early_exit:EarlyExit", EarlyExitConfig),
    "random": Row(f"{_HERE}.random_paths:RandomPaths", RandomConfig),
    "static": Row(f"{_HERE}.static:Static", StaticConfig),
    "transformer_inverse": Row(f"{_HERE}.transformer_inverse:TransformerInverse", TransformerInverseConfig),
}
