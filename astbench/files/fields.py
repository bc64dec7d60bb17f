"""Values of rows that come from JSON, parquet or the hub, each of the type that is needed. Imports nothing heavy.

What can be taken without a doubt is taken: a whole float as an integer, an integer id as text. All else is refused with
the place and the column.
"""

from __future__ import annotations

import reprlib
from typing import Any

from astbench.errors import DataError
from astbench.files.text import LONGEST, plain


def field(row: Any, name: str, where: str) -> Any:
    """A row's value, whatever it is.

    Raises:
        DataError: the row is no mapping, or has no such column.
    """
    if not isinstance(row, dict) or name not in row:
        raise DataError(f"{where}: column {name!r} is missing")
    return row[name]


def text(row: Any, name: str, where: str) -> str:
    """A text, as :func:`astbench.files.text.plain` leaves it.

    Raises:
        DataError: missing, of another type, not valid Unicode, or too long.
    """
    return _plain(_of(str, row, name, where), name, where)


def raw(row: Any, name: str, where: str) -> str:
    """A text as it stands, such as a file's name, or what other columns count the characters of.

    Raises:
        DataError: missing, or of another type.
    """
    return str(_of(str, row, name, where))


def texts(row: Any, name: str, where: str) -> list[str]:
    """A list of texts.

    Raises:
        DataError: missing, of another type, not valid Unicode, or too long.
    """
    values = rows(row, name, where)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: column {name!r} must be a list of texts")
    return [_plain(value, name, where) for value in values]


def identity(row: Any, name: str, where: str) -> str:
    """An id, as text; it may be a number.

    Raises:
        DataError: missing, or neither text nor a whole number.
    """
    value = field(row, name, where)
    if isinstance(value, str):
        return _plain(value, name, where)
    return str(whole(row, name, where))


def whole(row: Any, name: str, where: str) -> int:
    """A whole number.

    Raises:
        DataError: missing, or no whole number; true and false are none.
    """
    value = field(row, name, where)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, name, where)
    return value


def flag(row: Any, name: str, where: str) -> bool:
    """True or false; false where it is missing or null.

    Raises:
        DataError: of another type.
    """
    value = row.get(name) if isinstance(row, dict) else field(row, name, where)
    if value is not None and not isinstance(value, bool):
        raise _wrong(value, name, where)
    return bool(value)


def mapping(row: Any, name: str, where: str) -> dict[str, Any]:
    """A row inside the row.

    Raises:
        DataError: missing, or of another type.
    """
    return dict(_of(dict, row, name, where))


def rows(row: Any, name: str, where: str) -> list[Any]:
    """A list of whatever.

    Raises:
        DataError: missing, or of another type.
    """
    return list(_of((list, tuple), row, name, where))


def _of(kind: type | tuple[type, ...], row: Any, name: str, where: str) -> Any:
    value = field(row, name, where)
    if not isinstance(value, kind):
        raise _wrong(value, name, where)
    return value


def _plain(value: str, name: str, where: str) -> str:
    if len(value) > LONGEST:
        raise DataError(f"{where}: column {name!r} is longer than {LONGEST:,} characters, the most of one text")
    return plain(value, f"{where}: column {name!r}")


def _wrong(value: Any, name: str, where: str) -> DataError:
    # Not `repr`: what is nested a thousand times cannot be written out.
    return DataError(f"{where}: column {name!r} is of the wrong form: {reprlib.repr(value)[:60]}")
