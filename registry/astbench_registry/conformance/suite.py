"""The conformance suite: what every attention must do, whoever wrote it.

One implementation for pytest (`tests/registry/conformance/`) and for `astbench check NAME`. It builds
the variant with small options, runs it on short inputs in float64 whose sizes all differ, and compares it
with itself or with attention written out. What a variant declares it cannot do (its capability record) is
skipped, with that reason; nothing else is.

>>> from astbench_registry.conformance import check
>>> {result.status for result in check("dense", properties=["causality"])}
{'pass'}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from astbench_registry.capabilities import AttentionConfig
from astbench_registry.conformance import gradients as of_gradients
from astbench_registry.conformance import outputs as of_outputs
from astbench_registry.conformance.cases import Factory, Subject
from astbench_registry.conformance.checks import APPLIES, Check, Failure, Skip
from astbench_registry.registry import build_attention, config_class, make_config

PROPERTIES: dict[str, Check] = {
    function.__name__: function
    for function in (
        of_outputs.interface,
        of_outputs.causality,
        of_outputs.padding_invariance,
        of_outputs.batch_invariance,
        of_gradients.empty_batch,
        of_gradients.gradients,
        of_gradients.parameter_gradients,
        of_outputs.decode,
        of_outputs.gqa,
        of_outputs.full_density,
        of_gradients.fully_masked,
        of_gradients.nan_memory,
        of_outputs.low_precision,
        of_gradients.determinism,
        of_outputs.save_load,
        of_outputs.scale,
        of_outputs.statistics,
        of_outputs.cost,
    )
}
"""Name to check, in the order in which they run."""


@dataclass(frozen=True)
class Result:
    """One property of one variant under one pattern.

    Attributes:
        variant: The attention's name.
        property: A key of :data:`PROPERTIES`.
        pattern: One of the four patterns.
        status: "pass", "fail" or "skip".
        detail: Why it failed or was skipped, in one line.
    """

    variant: str
    property: str
    pattern: str
    status: Literal["pass", "fail", "skip"]
    detail: str = ""


def check(
    name: str, options: Mapping[str, Any] | None = None, *, properties: Iterable[str] | None = None
) -> list[Result]:
    """Run the suite on a registered attention, ours or a plugin's.

    Args:
        name: What `--attention` takes.
        options: Laid over the variant's `conformance_options`.
        properties: Some keys of :data:`PROPERTIES`; all by default.

    Raises:
        ValueError: an unknown name, option or property.
    """
    config = make_config(name, {**config_class(name).conformance_options, **(options or {})})
    return check_module(
        lambda config, shape: build_attention(name, config, shape), config, name=name, properties=properties
    )


def buildable(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Build the variant once, as :func:`check` would.

    Raises:
        ValueError: it refuses, for instance because a backend's package is missing.
    """
    config = make_config(name, {**config_class(name).conformance_options, **(options or {})})
    Subject(name, lambda config, shape: build_attention(name, config, shape), config, config.can.patterns[0]).build()


def check_module(
    factory: Factory,
    config: AttentionConfig,
    *,
    name: str = "unregistered",
    properties: Iterable[str] | None = None,
) -> list[Result]:
    """Run the suite on whatever `factory(config, shape)` builds, registered or not."""
    wanted = list(PROPERTIES) if properties is None else list(properties)
    unknown = [x for x in wanted if x not in PROPERTIES]
    if unknown:
        raise ValueError(f"unknown property {unknown[0]!r}; there are: {', '.join(PROPERTIES)}")
    return [
        _try(prop, Subject(name, factory, config, pattern))
        for prop in wanted
        for pattern in config.can.patterns
        if pattern in APPLIES[prop]
    ]


def _try(name: str, subject: Subject) -> Result:
    status: Literal["pass", "fail", "skip"] = "pass"
    detail = ""
    try:
        PROPERTIES[name](subject)
    except Skip as skip:
        status, detail = "skip", str(skip)
    except Failure as failure:
        status, detail = "fail", str(failure)
    except Exception as error:  # whatever a variant raises is a finding about it, not about the suite
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return Result(subject.name, name, subject.pattern, status, " ".join(detail.split()))
