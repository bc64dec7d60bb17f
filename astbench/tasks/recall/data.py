"""What the data modules of the recall probes share."""

from __future__ import annotations

from typing import ClassVar

from astbench.backbones.presets import Head
from astbench.tasks.generated import ProbeData

IGNORED = -100
"""Label of the positions that nothing is asked at."""


class RecallData(ProbeData):
    """Inputs with questions in them.

    An example holds `input_ids` and `labels` `(length,)`, the next token where it belongs to an answer and
    `IGNORED` elsewhere, and `question` `(length,)`, the number of the question that a label belongs to.
    """

    head: ClassVar[Head] = "causal_lm"
    length_option: ClassVar[str] = "length"
    grouped_by: ClassVar[str]  # what the record also tells the accuracy by
    num_questions: int
    signature: str

    def groups(self, split: str, index: int) -> list[str]:
        """The group of each question of an example, beginning with a number."""
        raise NotImplementedError
