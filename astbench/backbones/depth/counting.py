"""Which layers ran: counted over passes, and item by item."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from astbench.backbones.depth.folding import Folded


@dataclass
class DepthCount:
    """Sums over passes; two of them add up.

    Attributes:
        paths: How many inputs took each path, such as `1011`.
        complexity: Sum of the predicted complexities, and of how many inputs.
    """

    paths: Counter[str] = field(default_factory=Counter)
    complexity: tuple[float, int] = (0.0, 0)

    def add(self, folded: Folded) -> list[dict[str, Any]]:
        """Count a pass; what is said of each of its inputs."""
        paths = ["".join("01"[runs] for runs in row) for row in folded.ran.int().tolist()]
        self.paths.update(paths)
        complexity = folded.choice.complexity
        if complexity is None:
            return [{"path": path} for path in paths]
        values = complexity.tolist()
        self.complexity = self.complexity[0] + sum(values), self.complexity[1] + len(values)
        return [{"path": path, "complexity": round(c, 6)} for path, c in zip(paths, values, strict=True)]

    def __add__(self, other: DepthCount) -> DepthCount:
        """Of the passes of both."""
        (a, m), (b, n) = self.complexity, other.complexity
        return DepthCount(self.paths + other.paths, (a + b, m + n))

    def summary(self, costs: tuple[float, ...]) -> dict[str, Any]:
        """Mean depth, share of the stack's operations, and how the inputs spread.

        Args:
            costs: Each layer's share.
        """
        inputs = max(1, self.paths.total())
        layers = len(costs)
        histogram = [0] * (layers + 1)
        use = [0] * layers
        for path, count in self.paths.items():
            histogram[path.count("1")] += count
            for layer, runs in enumerate(path):
                use[layer] += count * (runs == "1")
        found = {
            "layers": layers,
            "inputs": self.paths.total(),
            "mean_layers": sum(number * count for number, count in enumerate(histogram)) / inputs,
            "share": sum(cost * count for cost, count in zip(costs, use, strict=True)) / inputs,
            "histogram": histogram,
            "use": [round(count / inputs, 5) for count in use],
            "paths": len(self.paths),
            "most_frequent": dict(self.paths.most_common(8)),
        }
        total, seen = self.complexity
        return {**found, "complexity": total / seen} if seen else found
