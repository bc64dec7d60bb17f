"""YAML as plain data, of a size that a person could have written, each key once. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MOST_CHARACTERS = 250_000
MOST_VALUES = 100_000
"""Values in all, those behind an alias as often as it is used."""
DEEPEST = 50


def plain_yaml(text: str) -> Any:
    """What a text of YAML says.

    Raises:
        ValueError: no YAML, a key twice, or more than a config can sensibly hold; in one line.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS:,} characters")
    try:
        data = yaml.load(text, _Loader)  # a safe loader: see below
    except RecursionError as error:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also of dates and numbers that cannot be
        raise ValueError(" ".join(str(error).split())[:200]) from error
    _check_size(data)
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: the first would be lost without a word."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """See PyYAML: takes in what `<<` names."""
        if not getattr(node, "astbench_read", False):  # a second time it holds what it took in
            self._refuse_doubles(node)
            node.astbench_read = True  # type: ignore[attr-defined]
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")

    def _refuse_doubles(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable):
                if name in seen:
                    raise ValueError(
                        f"{str(name)[:60]!r} stands twice, the second time in line {key.start_mark.line + 1}"
                    )
                seen.add(name)


def _check_size(data: Any) -> None:
    waiting, seen = [(data, 1)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST:
            raise ValueError(f"it nests deeper than {DEEPEST} levels")
        if seen > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, each as often as it is named")
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        waiting += [(part, depth + 1) for part in parts]
