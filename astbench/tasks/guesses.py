"""What classifiers make of their guesses: accuracy, and each example's own result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from astbench.tasks.generated import share_of


def accuracies(guesses: Mapping[int, tuple[int, int]]) -> dict[str, float]:
    """Percent right, and what always answering the most frequent class would get.

    Args:
        guesses: Guessed and right class by the example's number.
    """
    rights = [right for _, right in guesses.values()]
    (most, _), *_ = Counter(rights).most_common(1)
    return {
        "accuracy": share_of([guess == right for guess, right in guesses.values()]),
        "majority": share_of([right == most for right in rights]),
    }


def items_of(guesses: Mapping[int, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """The result of each example, for `items.json`."""
    return {str(i): {"accuracy": 100.0 * (g == r), "guess": g, "label": r} for i, (g, r) in guesses.items()}
