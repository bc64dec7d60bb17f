"""Local text in the place of the essays that RULER hides its needles in, which only the network has."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from os.path import exists, isdir
from types import SimpleNamespace
from typing import Any

from astbench.errors import DataError
from astbench.files.paths import asked_path
from astbench.files.text import read_text

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass
class Haystack:
    """Running text from a file, or from the text files of a folder in the order of their names.

    Attributes:
        text: All of it.
        sha256: Of the text.
        used: Whether a task asked for essays.
    """

    text: str
    sha256: str = field(init=False)
    used: bool = False

    def __post_init__(self) -> None:
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def read(cls, name: str) -> Haystack:
        """The text behind `--data.haystack`.

        Raises:
            DataError: nothing there, no text in it, or a file that is no text.
        """
        path, place = asked_path(name), f"--data.haystack={name}"
        if not exists(path):
            raise DataError(f"{place} does not exist")
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt") if isdir(path) else [path]
        text = " ".join(read_text(file) for file in files)
        if not text.strip():
            raise DataError(f"{place} holds no text{' in files named *.txt' if isdir(path) else ''}")
        return cls(text)

    @contextmanager
    def in_place_of_essays(self) -> Iterator[None]:
        """Within, RULER's generators take this text for `baber/paul_graham_essays`, and nothing is fetched.

        They find ends of sentences, where needles may stand, with tables of NLTK's that the network has too. Here a
        sentence ends at a `.`, `!` or `?` with white space behind it.
        """
        import nltk

        with replaced(nltk, "download", _nothing), redirect_stdout(StringIO()):
            from lm_eval.tasks.ruler import prepare_niah

        prepare_niah.get_haystack.cache_clear()
        try:
            with (
                replaced(prepare_niah, "datasets", SimpleNamespace(load_dataset=self._essays)),
                replaced(prepare_niah, "cached_sent_tokenize", _SENTENCE.split),
            ):
                yield
        finally:
            prepare_niah.get_haystack.cache_clear()

    def _essays(self, *arguments: Any, **options: Any) -> dict[str, list[str]]:
        self.used = True
        return {"text": [self.text]}


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within, a module's name stands for something else."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _nothing(*arguments: Any, **options: Any) -> bool:
    """In the place of a download that would only be waited for."""
    return False
