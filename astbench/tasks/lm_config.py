"""Options of language modelling. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModelConfig:
    """Nothing to set yet: context and stride belong to the data."""
