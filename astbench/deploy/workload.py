"""Requests of exactly so many tokens, cut from a text: the same ones for every server and every rate."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any

from astbench.backbones.presets import BackboneConfig
from astbench.backbones.tokenizers import load_tokenizer, saved_tokenizer
from astbench.deploy.recipe import PATHS, Load, Recipe
from astbench.errors import DataError
from astbench.files.text import read_text

MOST_CHARACTERS = 4_000_000
"""Of a text, from its beginning: more would only take longer to cut into tokens."""


class Workload:
    """What is sent.

    Args:
        recipe: What was asked for.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def check(self) -> None:
        """Whether the text is long enough for every load, before any server starts.

        Raises:
            DataError: it is not, or cannot be read.
        """
        for load in self._recipe.loads:
            self.bodies(load, 1)

    def bodies(self, load: Load, count: int) -> list[dict[str, Any]]:
        """The first so many requests of a load.

        Raises:
            DataError: the text is shorter than one of them, or cannot be read.
        """
        if self._recipe.route != PATHS[0]:
            return [
                {"question": self._recipe.question, "document": self._document(load, number)} for number in range(count)
            ]
        ids, size = self._ids, load.length - load.output
        starts = [self._start(load, number, size) for number in range(count)]
        written = {"max_tokens": load.output, "ignore_eos": True, "stream": True, "return_token_ids": True}
        return [{"prompt": ids[start : start + size], **written} for start in starts]

    def _document(self, load: Load, number: int) -> str:
        """The text behind so many tokens, as it stands."""
        start = self._start(load, number, load.length)
        first, last = self._offsets[start], self._offsets[start + load.length - 1]
        return self._text[first[0] : last[1]]

    def _start(self, load: Load, number: int, size: int) -> int:
        if len(self._ids) < size:
            raise DataError(
                f"{self._recipe.text} has {len(self._ids):,} tokens and a prompt needs {size:,}; name a longer text"
            )
        place = random.Random(f"{self._recipe.seed} {load.length} {number}")
        return place.randrange(len(self._ids) - size + 1)

    @cached_property
    def _text(self) -> str:
        return read_text(self._recipe.text.expanduser())[:MOST_CHARACTERS]

    @cached_property
    def _tokens(self) -> Any:
        """By the reference's tokenizer; all servers get the same requests."""
        served = self._recipe.reference
        if served.of_run:
            tokenizer = saved_tokenizer(served.model)
        else:
            tokenizer = load_tokenizer(BackboneConfig(name=served.model))
        return tokenizer(self._text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    @cached_property
    def _ids(self) -> list[int]:
        return list(self._tokens["input_ids"])

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        return list(self._tokens["offset_mapping"])
