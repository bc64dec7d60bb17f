"""The table: every built-in transform, its options and where its code is. Imports no torch."""

from __future__ import annotations

from astbench_registry.class_table import Row
from astbench_registry.transforms.configs.hard import HardConfig
from astbench_registry.transforms.configs.log3bit import Log3bitConfig

_HERE = "astbench_registry.transforms"

BUILTIN: dict[str, Row] = {
    "hard": Row(f"{_HERE}.hard:Hard", HardConfig),
    "log3bit": Row(f"{_HERE}.log3bit:Log3bit", Log3bitConfig),
}
