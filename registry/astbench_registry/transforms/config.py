"""The base of every transform's options. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class TransformConfig:
    """Base of every transform's options: a frozen dataclass of plain values with defaults.

    Subclasses check their fields in `__post_init__`, that of this class first, with messages that name the flag
    (:meth:`require`).

    Attributes:
        paper: Where it comes from.
        conformance_options: Options under which the conformance suite's rows of tens of weights show what it does.

    Args:
        layers: Layers that are transformed, counted from 0 within each stack; all by default.
    """

    layers: list[int] | None = None

    paper: ClassVar[str] = ""
    conformance_options: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        chosen = self.layers
        self.require(
            chosen is None or (len(chosen) > 0 and len({*chosen}) == len(chosen) and min(chosen) >= 0),
            "layers",
            "layer numbers from 0, each once, at least one",
        )

    @property
    def calibrated(self) -> bool:
        """Whether it has to see attention values of other texts before it can change any; no by default."""
        return False

    @property
    def most_values(self) -> int | None:
        """How many different values the weights of a head have at most afterwards, zero among them; None: any."""
        return None

    def headline(self) -> dict[str, Any]:
        """The options that a run's first lines show."""
        return {key: value for key, value in self.as_dict().items() if value is not None}

    def require(self, condition: bool, field: str, expected: str) -> None:
        """Raise `ValueError` naming the option, what was expected and what was given."""
        if not condition:
            raise ValueError(f"--transform.{field} must be {expected}, got {getattr(self, field)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what records hold."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
