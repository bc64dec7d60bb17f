r"""Text as every reader of data takes it: one policy, which stands here alone. Imports nothing heavy.

- A file is UTF-8. Other bytes are refused, with their place; so is a NUL, which damaged files and UTF-16 hold.
- A byte order mark in front is no part of the text.
- A line ends at `\n`, `\r\n` or `\r`, and nowhere else. The reader gets `\n`. U+2028, U+2029, U+0085, form feeds
  and the like are characters of their line.
- Characters are composed (Unicode's NFC): an accent that is a character of its own joins its letter. Both spellings
  are one text, so they give one number.
- Blanks and tabs stay. Tables are split into cells first, and cells are stripped afterwards.
- Blank lines are none in tables and JSON lines. Where lines are counted (parallel files, running text) they stay.
- A key that comes several times in one JSON object has no value: a reader that wants it refuses it.
- A line has at most LONGEST characters; so has a text that is one example. More is refused: memory and time grow
  with the longest piece that a tokenizer gets.

Strings inside JSON and parquet, and texts on the command line, go the same way; see :func:`plain`.
"""

from __future__ import annotations

import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from astbench.errors import DataError
from astbench.files.reading import MOST_BYTES, UNREADABLE, one_line, open_bytes, read_bytes, unreadable

LONGEST = 8 << 20
"""Most characters of a line, and of a text that is one example."""


def plain(text: str, place: str) -> str:
    """A text by the policy above, its length aside.

    Raises:
        DataError: it holds a NUL, or half of a surrogate pair; `place` says where.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place} is not valid Unicode: {error.reason} at character {error.start + 1}") from error
        text = text.removeprefix("\ufeff")
    return _clean(text, place)


def _clean(text: str, place: str) -> str:
    """What was decoded, without a NUL, its lines ended by newlines, its characters composed."""
    if "\0" in text:
        before = text.count("\n", 0, text.index("\0"))
        where = f" in line {before + 1}" if before else ""
        raise DataError(f"{place} holds a NUL character{where}: no text, or UTF-16, or a damaged file")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text)


def read_text(file: Path, *, most: int = MOST_BYTES, place: str = "") -> str:
    """The whole content, unpacked, as text.

    Args:
        file: Where it is.
        most: Refuse more bytes than these.
        place: What to call the file in messages; its path if not given.

    Raises:
        DataError: not readable, no UTF-8, a NUL, or too long; says which, and where.
    """
    place = place or str(file)
    text = _clean(_decoded(read_bytes(file, most, place), place), place)
    begin = 0
    while len(text) - begin > LONGEST:
        end = text.rfind("\n", begin, begin + LONGEST + 1)
        if end < 0:
            raise _too_long(f"{place}:{text.count(chr(10), 0, begin) + 1}")
        begin = end + 1
    return text


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} cannot be read as UTF-8 text: {one_line(error)}") from error


def read_document(file: Path, place: str = "") -> str:
    """The text of a file that is one example, and so may not be longer than LONGEST.

    Raises:
        DataError: see :func:`read_text`.
    """
    return read_text(file, most=LONGEST, place=place)


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file without their ends, numbered from 1; streams, for tables can be larger than memory.

    Raises:
        DataError: not readable, no UTF-8, a NUL, or too long; says in which line.
    """
    try:
        source = open_bytes(file)
    except UNREADABLE as error:
        raise unreadable(file, error) from error
    yield from lines_of(source, file)


def lines_of(source: IO[bytes], file: Path) -> Iterator[tuple[int, str]]:
    """As :func:`lines`, of an open file, which is closed at the end."""
    number = 0
    try:
        # Wrong bytes become surrogates, so that it is known which line they are in.
        with io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape", newline=None) as text:
            while line := text.readline(LONGEST + 2):
                number += 1
                if ended := line[-1] == "\n":
                    line = line[:-1]
                if len(line) > LONGEST:
                    raise _too_long(f"{file}:{number}")
                if not line.isascii() or "\0" in line:
                    _check_utf8(line, file, number)
                    line = _clean(line, f"{file}:{number}")
                if ended or line.strip():
                    yield number, line
    except UNREADABLE as error:
        raise unreadable(file, error, f" ({file.name}:{number + 1})") from error


def read_json(file: Path) -> Any:
    """What a JSON file holds; its strings are as they stand there, since other fields may count their characters.

    Raises:
        DataError: not readable, or no JSON.
    """
    return _json(_decoded(read_bytes(file), str(file)), str(file))


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each line that is not blank.

    Raises:
        DataError: not readable, or a line that is no JSON; with its number.
    """
    for number, line in lines(file):
        if line.strip():
            yield f"{file}:{number}", _json(line, f"{file}:{number}")


class _Repeated:
    """Stands for the values of a key that comes several times in one JSON object: no reader takes it for one."""

    def __repr__(self) -> str:
        return "the key comes several times"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        found.update((key, _Repeated()) for key, count in counts.items() if count > 1)
    return found


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # brackets within brackets within brackets
        raise DataError(f"{place} cannot be read: {one_line(error)}") from error


def _check_utf8(line: str, file: Path, number: int) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{file} cannot be read as UTF-8 text: {file.name}:{number} is not UTF-8, its character {error.start + 1} "
            f"is byte 0x{ord(line[error.start]) & 0xFF:02x}"
        ) from error


def _too_long(place: str) -> DataError:
    return DataError(f"{place} is longer than {LONGEST:,} characters, the most that is read as one piece; break it up")
