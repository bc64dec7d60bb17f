"""Tables and files that may not be what they are read as: ids for sentences, one language for the other.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from astbench.errors import DataError

_NUMBER = re.compile(r"[-+]?\d+([.,:]\d+)*")
_WORD = re.compile(r"\w+")
_UMLAUT = re.compile("[äöüß]")

# Frequent words that the other language does not have.
_GERMAN = frozenset(
    "aber auch auf aus bei das dass dem den der des dich die ein eine einem einen einer er es für habe haben "
    "ich ihr im ist ja kann kein mein mich mit nach nicht nur oder sein sich sie sind über um und uns vom von waren "
    "wenn wie wir wird zu zum zur".split()
)
_ENGLISH = frozenset(
    "a about and are as at be but by can do for from had has have he her his how i if is it its like my not of on or "
    "our she that the their them they this to we were what when which who will with would you your".split()
)

_LOOKED_AT = 2000
"""Pairs that are looked at: as good as all of them."""


def refuse_ids(file: Path, pairs: Sequence[tuple[str, str]], first: Sequence[str]) -> None:
    """Refuse a table whose first two columns hold numbers.

    Args:
        file: The table.
        pairs: What was read.
        first: All cells of the first line: which of them are text is told.

    Raises:
        DataError: naming the column, and the option that says which to read.
    """
    for column, cells in enumerate(zip(*pairs, strict=True), 1):
        written = [cell for cell in cells if cell]
        numbers = sum(_NUMBER.fullmatch(cell) is not None for cell in written)
        if numbers > 0.9 * len(written):
            texts = [str(n) for n, cell in enumerate(first, 1) if cell and not _NUMBER.fullmatch(cell)]
            names = ",".join(texts[:2]) if len(texts) > 1 else "ENGLISH,GERMAN"
            raise DataError(
                f"{file}: column {column} holds numbers, as ids are, and no sentences; --data.columns={names} names "
                "the columns of English and German"
            )


def refuse_swapped(file: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse a table that looks like German and English, in this order.

    Raises:
        DataError: naming the option that says what stands where.
    """
    # What is called de-en mostly has German first.
    if swapped(pairs, unless_told="de-en" in file.name.lower()):
        raise DataError(
            f"{file}: column 1, which is read as English, looks like German, and column 2 like English; "
            "--data.columns=2,1 takes them the other way round, --data.columns=1,2 as they are"
        )


def swapped(pairs: Sequence[tuple[str, str]], *, unless_told: bool = False) -> bool:
    """Whether what is read as English looks more like German than the other side does.

    Args:
        pairs: English and German, as they are read.
        unless_told: What to say where the words tell nothing.
    """
    some = pairs[:_LOOKED_AT]
    english, german = (sum(_germanness(pair[side]) for pair in some) for side in (0, 1))
    return unless_told if english == german else english > german


def _germanness(text: str) -> int:
    words = _WORD.findall(text.lower())
    umlauts = sum(_UMLAUT.search(word) is not None for word in words)
    return umlauts + sum((word in _GERMAN) - (word in _ENGLISH) for word in words)
