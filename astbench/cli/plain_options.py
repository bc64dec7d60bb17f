"""Parsed options as plain data: for a config in YAML, and for a record."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

from jsonargparse import Namespace


def as_yaml(value: Any) -> Any:
    """Options as YAML can say them: defaults of callbacks may be members of an enumeration, or other objects."""
    if isinstance(value, Namespace):
        for key, part in vars(value).items():
            setattr(value, key, as_yaml(part))
        return value
    if isinstance(value, dict):
        return {key: as_yaml(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_yaml(part) for part in value]
    if isinstance(value, Enum):
        return value.name
    return value if value is None or type(value) in (str, bool, int, float) else str(value)


def plain_options(options: Namespace) -> dict[str, Any]:
    """The options as JSON-able data."""
    plain = dict(json.loads(json.dumps(options.as_dict(), default=str)))
    plain.pop("config", None)  # where the options were read from; they are all here
    for group in ("transform", "depth"):
        if plain[group]["name"] is None:
            plain.pop(group)
    return plain
