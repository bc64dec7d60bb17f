"""The conformance suite of depth policies: what every one must do, whoever wrote it.

One implementation for pytest and for `astbench check NAME`, on an encoder and a decoder of four layers in float64 with
dense attention in them. What a policy does is held against models that were built with just the layers of its paths.

>>> from astbench.backbones.depth.conformance import check_depth
>>> {result.status for result in check_depth("static", properties=["paths"])}
{'pass'}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from astbench.backbones.depth.conformance.models import HIDDEN, LAYERS, Failure, Skip, Subject
from astbench.backbones.depth.conformance.properties import DEPTH_PROPERTIES
from astbench_registry.depth.interface import StackShape
from astbench_registry.depth.registry import build_depth, depth_config_class, make_depth_config

__all__ = ["DEPTH_PROPERTIES", "DepthResult", "Subject", "check_depth", "check_subject"]

LONGEST_DETAIL = 400


@dataclass(frozen=True)
class DepthResult:
    """One property of one policy.

    Attributes:
        depth: Its name.
        property: A key of :data:`DEPTH_PROPERTIES`.
        status: "pass", "fail" or "skip".
        detail: Why it failed or was skipped, in one line.
    """

    depth: str
    property: str
    status: Literal["pass", "fail", "skip"]
    detail: str = ""


def check_depth(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    properties: Iterable[str] | None = None,
    attention: str = "dense",
) -> list[DepthResult]:
    """Run the suite on a registered policy, ours or a plugin's.

    Args:
        name: What `--depth` takes.
        options: Laid over the policy's `conformance_options`.
        properties: Some keys of :data:`DEPTH_PROPERTIES`; all by default.
        attention: Registered attention in the models.

    Raises:
        ValueError: an unknown name, option or property.
    """
    config = make_depth_config(name, {**depth_config_class(name).conformance_options, **(options or {})})
    build_depth(name, config, StackShape.of_equal_layers(LAYERS, HIDDEN))  # mistakes end before any work
    subject = Subject(lambda config, shape: build_depth(name, config, shape), config, attention=attention)
    return check_subject(subject, name, properties)


def check_subject(
    subject: Subject, name: str = "unregistered", properties: Iterable[str] | None = None
) -> list[DepthResult]:
    """Run the suite on whatever a subject builds, registered or not."""
    wanted = list(DEPTH_PROPERTIES) if properties is None else list(properties)
    if unknown := [one for one in wanted if one not in DEPTH_PROPERTIES]:
        raise ValueError(f"unknown property {unknown[0]!r}; there are: {', '.join(DEPTH_PROPERTIES)}")
    return [_try(one, subject, name) for one in wanted]


def _try(name: str, subject: Subject, depth: str) -> DepthResult:
    status: Literal["pass", "fail", "skip"] = "pass"
    detail = ""
    try:
        DEPTH_PROPERTIES[name](subject)
    except Skip as skip:
        status, detail = "skip", str(skip)
    except Failure as failure:
        status, detail = "fail", str(failure)
    except Exception as error:  # whatever a policy raises is a finding about it, not about the suite
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return DepthResult(depth, name, status, " ".join(detail.split())[:LONGEST_DETAIL])
