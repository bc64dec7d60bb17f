"""The conformance suite of depth policies: what every one must do, whoever wrote it.

One implementation for pytest and for `astbench check NAME`, on an encoder and a decoder of four layers in float64 with
dense attention in them. What a policy does is held against models that were built with just the layers of its paths.

>>> from astbench.backbones.depth.conformance import check_depth
>>> {result.status for result in check_depth("static", properties=["paths"])}
{'pass'}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from astbench.backbones.depth.conformance.models import HIDDEN, LAYERS, Subject
from astbench.backbones.depth.conformance.properties import DEPTH_PROPERTIES
from astbench_registry.depth.interface import StackShape
from astbench_registry.depth.registry import build_depth, depth_config_class, make_depth_config
from astbench_registry.findings import Finding, findings

__all__ = ["DEPTH_PROPERTIES", "Subject", "check_depth", "check_subject"]


def check_depth(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    properties: Iterable[str] | None = None,
    attention: str = "dense",
) -> list[Finding]:
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
) -> list[Finding]:
    """Run the suite on whatever a subject builds, registered or not."""
    return findings(name, properties, DEPTH_PROPERTIES, subject)
