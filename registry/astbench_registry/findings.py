"""What a conformance suite finds: one property held against one subject, and its outcome in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

LONGEST_DETAIL = 400

Status = Literal["pass", "fail", "skip"]


class Failure(Exception):
    """The property does not hold."""


class Skip(Exception):
    """The subject excludes the property."""


@dataclass(frozen=True)
class Finding:
    """One property of one transform or depth policy.

    Attributes:
        name: Of what was tried.
        property: Which.
        status: "pass", "fail" or "skip".
        detail: Why it failed or was skipped, in one line.
    """

    name: str
    property: str
    status: Status
    detail: str = ""


def findings(
    name: str, properties: Iterable[str] | None, known: Mapping[str, Callable[[Any], None]], subject: Any
) -> list[Finding]:
    """Hold properties against a subject.

    Args:
        name: Of the subject.
        properties: Some keys of `known`; all if not given.
        known: What each does; raises :class:`Failure` or :class:`Skip`.
        subject: What they take.

    Raises:
        ValueError: a property that does not exist.
    """
    return [Finding(name, one, *tried(known[one], subject)) for one in asked(properties, known)]


def asked(properties: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """Properties by name, all of them if none are given.

    Raises:
        ValueError: one that does not exist.
    """
    known = list(known)
    wanted = known if properties is None else list(properties)
    if unknown := [one for one in wanted if one not in known]:
        raise ValueError(f"unknown property {unknown[0]!r}; there are: {', '.join(known)}")
    return wanted


def tried(
    check: Callable[[Any], None],
    subject: Any,
    told: Callable[[Exception], str] = lambda error: f"{type(error).__name__}: {error}",
) -> tuple[Status, str]:
    """What came of one property; `told` says what an error means that the subject itself raised."""
    status: Status = "pass"
    detail = ""
    try:
        check(subject)
    except Skip as skip:
        status, detail = "skip", str(skip)
    except Failure as failure:
        status, detail = "fail", str(failure)
    except Exception as error:  # whatever a subject raises is a finding about it, not about the suite
        status, detail = "fail", told(error)
    return status, " ".join(detail.split())[:LONGEST_DETAIL]
