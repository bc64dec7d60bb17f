"""The table: every built-in transform, its options and where its code is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from astbench_registry.transforms.config import TransformConfig
from astbench_registry.transforms.configs.hard import HardConfig
from astbench_registry.transforms.configs.log3bit import Log3bitConfig


@dataclass(frozen=True)
class Row:
    """One line of the table: the code (`module:Class`) and the options."""

    target: str
    config: type[TransformConfig]


_HERE = "astbench_registry.transforms"

BUILTIN: dict[str, Row] = {
    "hard": Row(f"{_HERE}.hard:Hard", HardConfig),
    "log3bit": Row(f"{_HERE}.log3bit:Log3bit", Log3bitConfig),
}
