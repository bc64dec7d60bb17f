"""The conformance suite: what every attention must do, whoever wrote it.

One implementation for pytest (`tests/registry/conformance/`) and for `astbench check NAME`. It builds
the variant with small options, runs it on short inputs in float64 whose sizes all differ, and compares it
with itself or with attention written out. What could go wrong only behind some hundred tokens is asked for there too,
with small options and with the defaults. What a variant declares it cannot do (its capability record) is
skipped, with that reason; nothing else is.

>>> from astbench_registry.conformance import check
>>> {result.status for result in check("dense", properties=["causality"])}
{'pass'}
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench_registry.capabilities import AttentionConfig
from astbench_registry.conformance import density as of_density
from astbench_registry.conformance import explicit as of_weights
from astbench_registry.conformance import gradients as of_gradients
from astbench_registry.conformance import long as of_length
from astbench_registry.conformance import outputs as of_outputs
from astbench_registry.conformance.cases import Factory, Subject
from astbench_registry.conformance.checks import APPLIES, Check
from astbench_registry.findings import Status, asked, tried
from astbench_registry.registry import build_attention, config_class, make_config

PROPERTIES: dict[str, Check] = {
    function.__name__: function
    for function in (
        of_outputs.interface,
        of_outputs.value_size,
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
        of_density.density,
        of_outputs.cost,
        of_weights.explicit_weights,
        of_length.long_causality,
        of_length.long_padding,
        of_length.long_decode,
        of_length.long_full_density,
    )
}
"""Name to check, in the order in which they run."""

"""Characters of a result's detail."""

_VARIANTS = "astbench_registry.variants"
_NOT_PLUGINS = ("astbench_registry", "astbench_kernels", "torch", "contextlib", "functools", "None")


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
    status: Status
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
    wanted = asked(properties, PROPERTIES)
    met: dict[str, str] = {}
    return [
        _try(prop, Subject(name, factory, config, pattern), met)
        for prop in wanted
        for pattern in config.can.patterns
        if pattern in APPLIES[prop]
    ]


def _try(name: str, subject: Subject, met: dict[str, str]) -> Result:
    """One result; `met`: exceptions that earlier ones told in full, and where."""
    here = f"{name}, {subject.pattern}"

    def told(error: Exception) -> str:
        what = f"{type(error).__name__}{_place(error)}"
        first = met.setdefault(what, here)
        return f"{what}: {error}" if first == here else f"{what}, as under {first}"

    return Result(subject.name, name, subject.pattern, *tried(PROPERTIES[name], subject, told))


def _place(error: Exception) -> str:
    """Where it was raised, ` at FILE:LINE`; empty where that is not known.

    The innermost line of a plugin, and of a variant of this package where no plugin is on the way.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    names = [(str(frame.f_globals.get("__name__")), frame.f_code.co_filename, line) for frame, line in frames]
    theirs = [(file, line) for module, file, line in names if module.partition(".")[0] not in _NOT_PLUGINS]
    ours = [(file, line) for module, file, line in names if module.startswith(f"{_VARIANTS}.")]
    for file, line in (theirs or ours)[-1:]:
        return f" at {Path(file).name}:{line}"
    return ""
