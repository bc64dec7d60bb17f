"""Sizes that no run can mean, refused before anything of that size is made. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from astbench.errors import ConfigError

_MOST_DATA = {"vocab_size": 1_000_000, "num_workers": 256, "batch_size": 1_000_000, "eval_batch_size": 1_000_000}
_MOST = 1_000_000_000
"""Of any other number of things."""

_BLOCKS = ("block_size", "bucket_size", "query_group", "query_tile", "compress_size")
"""Options that inputs are padded to a multiple of."""
_BLOCK = 8192
"""The largest block that is taken whatever the length of the inputs."""


def check_numbers(options: Mapping[str, Any], where: str) -> None:
    """Refuse infinities, NaN and integers of more than 63 bits among options, in groups within groups too.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in options.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Mapping):
                check_numbers(part, f"{where}{name}.")
            elif isinstance(part, float) and not math.isfinite(part):
                raise ConfigError(f"{where}{name} must be a finite number, got {part}")
            elif isinstance(part, int) and abs(part) >= 2**63 and not name.endswith("seed"):
                raise ConfigError(f"{where}{name} must be below 2**63, got {str(part)[:40]}")


def check_data_sizes(data: Mapping[str, Any]) -> None:
    """Refuse numbers of examples, tokens and processes that no machine holds.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in data.items():
        most = _MOST_DATA.get(name, _MOST)
        if isinstance(value, int) and value > most and not name.endswith("seed"):
            raise ConfigError(f"--data.{name} must be at most {most:,}, got {value}")


def check_attention_sizes(options: Mapping[str, Any], length: int = 0) -> None:
    """Refuse blocks far longer than any input: every input would be padded to one.

    Args:
        options: Of the attention.
        length: Of the longest input, in tokens.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in options.items():
        most = max(length, _BLOCK) if name in _BLOCKS else _MOST
        if isinstance(value, int) and value > most and not name.endswith("seed"):
            what = f"{most:,} tokens, longer than any input" if name in _BLOCKS else f"{most:,}"
            raise ConfigError(f"--attention.{name} must be at most {what}, got {value}")
