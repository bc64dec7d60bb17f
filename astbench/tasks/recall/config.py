"""Options of the recall probes. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecallConfig:
    """What is asked stands in the data's options; how it is scored leaves no choice."""
