"""Options of `lm_eval`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HarnessConfig:
    """What is asked stands in the data's options; how it is scored is lm-eval's."""
