"""Some rows of a batch, in everything that a layer is called with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from astbench_registry.mask import AttentionMask


def take_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of a batch in a layer's argument; what holds no rows comes back as it is.

    Args:
        value: Tensor of two dimensions or more, mask, tuple, list or dictionary of them, or anything else.
        rows: int64, their numbers.
        batch: Rows of the whole batch: a first dimension of that size is one of rows.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.dim() >= 2 and value.shape[0] == batch else value
    if isinstance(value, AttentionMask):
        key_valid, query_valid = (take_rows(part, rows, batch) for part in (value.key_valid, value.query_valid))
        return replace(value, key_valid=key_valid, query_valid=query_valid)
    if isinstance(value, tuple | list):
        return type(value)(take_rows(part, rows, batch) for part in value)
    if isinstance(value, dict):
        return {key: take_rows(part, rows, batch) for key, part in value.items()}
    return value
