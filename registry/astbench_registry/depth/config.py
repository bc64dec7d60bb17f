"""The base of every depth policy's options. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class DepthConfig:
    """Base of every policy's options: a frozen dataclass of plain values with defaults.

    Subclasses check their fields in `__post_init__`, that of this class first, with messages that name the flag
    (:meth:`require`).

    Attributes:
        paper: Where it comes from.
        learns: Whether the policy has parameters that training sets.
        conformance_options: Options under which models of four layers show what it does.

    Args:
        prompt: Of a causal model the policy sees this many first tokens of a sequence and no others, so that no later
            token moves the path.
        programs: Most programs that are kept, each of a path and a size of batch; the one that was not used for longest
            goes first.
    """

    prompt: int = 16
    programs: int = 64

    paper: ClassVar[str] = ""
    learns: ClassVar[bool] = False
    conformance_options: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        self.require(self.prompt >= 1, "prompt", "at least 1 token")
        self.require(self.programs >= 1, "programs", "at least 1 program")

    @property
    def first_layers(self) -> int:
        """Layers that every input goes through before the policy is asked; none by default."""
        return 0

    @property
    def distills(self) -> bool:
        """Whether training compares what comes out with the full depth's; no by default."""
        return False

    def headline(self) -> dict[str, Any]:
        """The options that a run's first lines show."""
        hidden = ("prompt", "programs")
        return {key: value for key, value in self.as_dict().items() if value is not None and key not in hidden}

    def require(self, condition: bool, field: str, expected: str) -> None:
        """Raise `ValueError` naming the option, what was expected and what was given."""
        if not condition:
            raise ValueError(f"--depth.{field} must be {expected}, got {getattr(self, field)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what records hold."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
