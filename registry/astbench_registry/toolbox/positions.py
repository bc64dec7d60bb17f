"""For variants with parameters per position: how many positions, and what to say when they do not suffice."""

from __future__ import annotations

from astbench_registry.interface import AttentionShape


def longest_input(name: str, max_length: int | None, shape: AttentionShape) -> int:
    """Positions to build parameters for: `--attention.max_length`, or the backbone's longest input.

    Raises:
        ValueError: neither is known.
    """
    longest = max_length or shape.max_positions
    if not longest:
        raise ValueError(
            f"attention '{name}' has parameters per position and the backbone names no longest input; "
            "set --attention.max_length"
        )
    return longest


def require_length(name: str, length: int, longest: int) -> None:
    """Raise `ValueError` when a sequence of `length` tokens needs more positions than there are parameters for."""
    if length > longest:
        raise ValueError(
            f"attention '{name}' has parameters for {longest} positions, got {length} tokens; "
            "raise --attention.max_length"
        )
