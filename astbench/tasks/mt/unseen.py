"""Sentences that training must not see: an example to be shown, or the test sets, if the training pairs hold them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import isfile  # of names that the system refuses pathlib's own raise
from pathlib import Path

from astbench.errors import ConfigError
from astbench.files.text import lines
from astbench.tasks.mt.sources import Pair

_WORDS = re.compile(r"\w+")


class Unseen:
    """What is left out of the training pairs, without regard to case and punctuation.

    Args:
        given: Sentences, left out wherever a pair's English or German holds one; or `@FILE`, where every line that
            is a pair's whole English or German leaves it out.
        folder: Where the files lie.

    Raises:
        ConfigError: a file that does not exist, or an entry without a word.
    """

    def __init__(self, given: Sequence[str], folder: Path) -> None:
        self.held = [_plain(entry) for entry in given if not entry.startswith("@")]
        if not all(self.held):
            raise ConfigError("--data.unseen holds an entry without a word; give sentences, or @FILE")
        self.lines: dict[str, set[str]] = {}
        for entry in given:
            if entry.startswith("@"):
                file = folder / entry[1:]
                if not isfile(file):
                    raise ConfigError(f"--data.unseen names {entry}, and {file} is not a file")
                self.lines[entry] = {text for _, line in lines(file) if (text := _plain(line))}

    def without(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
        """The pairs that may be trained on, and how many each entry left out, as notes.

        A pair that two entries would leave out counts with the first: sentences come before files.
        """
        kept, left_out = [], dict.fromkeys([*self.held, *self.lines], 0)
        for pair in pairs:
            reason = self._reason(pair)
            if reason is None:
                kept.append(pair)
            else:
                left_out[reason] += 1
        names = {text: f'"{text}"' for text in self.held} | {entry: entry[1:] for entry in self.lines}
        return kept, [
            f"{count:,} of {len(pairs):,} training pairs hold a sentence of --data.unseen ({names[reason]}): left out"
            for reason, count in left_out.items()
        ]

    def _reason(self, pair: Pair) -> str | None:
        sides = [_plain(side) for side in pair]
        for text in self.held:
            if any(f" {text} " in f" {side} " for side in sides):
                return text
        return next((entry for entry, found in self.lines.items() if not found.isdisjoint(sides)), None)


def _plain(text: str) -> str:
    """Words only, in lower case."""
    return " ".join(_WORDS.findall(text.casefold()))
