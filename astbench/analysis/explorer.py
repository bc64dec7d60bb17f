"""One sequence in full: what some of its queries kept and what dense attention would look at, block by block."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from astbench.analysis.rows import RowFacts


class Explorer:
    """Collects the layers' choices for one sequence.

    Args:
        tokens: Its tokens as they read, padding included.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = list(tokens)
        self._rows: list[int] = []
        self._real: list[bool] = []
        self._layers: dict[str, dict[str, Any]] = {}

    def add(self, path: str, facts: RowFacts, rows: Tensor, block_size: int) -> None:
        """A layer's facts of the batch's first sequence; nothing of a layer that reads other tokens."""
        found, real = rows.tolist(), facts.real[0].tolist()
        if self._layers and found != self._rows:
            return
        self._rows, self._real = found, real
        # A square root keeps small masses apart in a byte.
        mass = (facts.mass_of_block[0].clamp(0, 1).sqrt() * 255).round().byte().cpu().numpy()
        chosen = np.packbits(facts.chosen[0].cpu().numpy(), axis=-1)
        self._layers[path] = {
            "heads": mass.shape[0],
            "blocks": mass.shape[-1],
            "block_size": block_size,
            "mass": base64.b64encode(mass.tobytes()).decode(),
            "chosen": base64.b64encode(chosen.tobytes()).decode(),
        }

    def result(self, attention: str) -> dict[str, Any]:
        """Everything as plain data.

        `mass` of a layer: bytes `(heads, rows, blocks)`, the square root of a share in 255ths; `chosen`: bits in bytes
        `(heads, rows, ceil(blocks / 8))`, the first block the highest of its byte. Both in base64.
        """
        return {
            "schema": 1,
            "attention": attention,
            "tokens": self._tokens,
            "rows": self._rows,
            "real": self._real,
            "layers": self._layers,
        }
