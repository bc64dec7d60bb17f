"""What a good answer is. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from astbench.loadtest.client import Sent


@dataclass(frozen=True)
class Objective:
    """Within which an answer is good (service-level objective), in seconds; None asks for nothing.

    Attributes:
        latency: Of the whole answer, from when the request was due.
        ttft: To the first token, from when the request was due.
        tpot: A token after the first one, over the answer.
    """

    latency: float | None = None
    ttft: float | None = None
    tpot: float | None = None

    def met(self, row: Sent) -> bool:
        """Whether an answer was there in time, by all that is asked for; a text of one token has no time a token."""
        asked = ((self.latency, row.latency), (self.ttft, row.first_token), (self.tpot, row.per_token))
        return row.ok and all(most is None or found is None or found <= most for most, found in asked)

    def said(self) -> dict[str, float]:
        """What is asked for."""
        return {name: seconds for name, seconds in asdict(self).items() if seconds is not None}
