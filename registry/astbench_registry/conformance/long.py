"""The conformance suite's properties at several hundred tokens.

A variant that works in chunks of 128 may be right within the first chunk and wrong behind it. So these run at lengths
next to every option that is a size and next to powers of two, with the suite's small options and with the defaults.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import cycle

import torch

from astbench_registry.capabilities import AttentionConfig
from astbench_registry.conformance.cases import SIZES, Subject, attend, change_after, side_by_side
from astbench_registry.conformance.checks import holds_for, need, same
from astbench_registry.conformance.outputs import alone, within
from astbench_registry.interface import Attention

LONGEST = 400
POWERS = (127, 128, 129, 255, 256, 257)
CUTS = 8


def with_defaults(config: AttentionConfig) -> AttentionConfig | None:
    """The same, with the suite's small options at their defaults instead; None where that is nothing new or invalid."""
    plain = {f.name: f.default for f in fields(config)}
    small = config.conformance_options
    changed = {name: plain[name] for name, value in small.items() if getattr(config, name) == value != plain[name]}
    if not changed:
        return None
    try:
        return replace(config, **changed)
    except ValueError:  # options that were asked for do not go with the defaults
        return None


def lengths_of(config: AttentionConfig, number: int = 2) -> list[int]:
    """Lengths next to what these options count in and next to powers of two: the same ones for the same options.

    One is longer than 256 tokens.
    """
    sizes = {value for f in fields(config) if type(value := getattr(config, f.name)) is int and 2 <= value < LONGEST}
    near = [n for size in sorted(sizes) for m in (1, 2, 3) for n in (m * size - 1, m * size, m * size + 1)]
    fitting = sorted({n for n in (*near, *POWERS) if 90 < n <= LONGEST})
    draw = random.Random(repr(config))
    long = [n for n in fitting if n > 256]
    return [draw.choice(long), *draw.sample(fitting, number - 1)]


def _settings(subject: Subject, *, full_density: bool = False) -> Iterator[tuple[Attention, Subject, int]]:
    """A module, the subject with its options, and a length, for small options and for the defaults."""
    for config in (subject.config, with_defaults(subject.config)):
        if config is None:
            continue
        other = replace(subject, config=config)
        longest = other.can.max_length or LONGEST
        # Room for the next multiple of what the variant takes.
        module = other.build(full_density=full_density, max_positions=2 * LONGEST)
        for length in lengths_of(config):
            yield module, other, min(length, longest)


@holds_for("causal_self", "causal_cross")
def long_causality(subject: Subject) -> None:
    """No output moves when later tokens change, at several hundred tokens."""
    need(subject.can.strictly_causal, "not strictly causal")
    g = torch.Generator().manual_seed(5)
    for module, other, length in _settings(subject):
        case = other.case(length, length, batch=1)
        length = case.q.shape[2]
        cuts = torch.randint(1, length, (CUTS,), generator=g).tolist()
        changed = [change_after(case, cut, size, g) for cut, size in zip(cuts, cycle(SIZES), strict=False)]
        together = side_by_side(changed)
        with torch.no_grad():
            before, after = case.out(module), together.out(module)
        for row, cut in enumerate(cuts):
            what = f"changing tokens from {cut} on, of {length}, moves earlier outputs"
            same(after[row : row + 1, :, :cut], before[:, :, :cut], what)


@holds_for()
def long_padding(subject: Subject) -> None:
    """A sequence alone gives what it gives behind and in front of padding, at several hundred tokens."""
    need(subject.can.padding, "no padding")
    for module, other, length in _settings(subject):
        case = other.case(length, length, batch=3)
        keys = case.k.shape[2]
        some = other.length(keys * 2 // 3)
        spans = [slice(0, keys), slice(0, some), slice(keys - some, keys)]
        valid = torch.stack([within(span, keys) for span in spans])
        with torch.no_grad():
            alone(module, case.with_mask(key_valid=valid), spans, f" of {keys} tokens")


@holds_for("causal_self", "causal_cross")
def long_decode(subject: Subject) -> None:
    """Decoding the last tokens of several hundred equals one full pass, summaries of blocks kept or not."""
    need(subject.can.decode, "no decoding")
    for module, other, length in _settings(subject):
        case = other.case(length, length, batch=1)
        length = case.q.shape[2]
        with torch.no_grad():
            whole = case.out(module)
            for summaries in (None, module.new_cache_state()):
                if summaries is None and subject.can.decode_state:
                    continue
                for start, stop in ((0, length - 4), (length - 4, length - 3), (length - 3, length - 1)):
                    step = case.queries(start, stop).out(module, summaries=summaries)
                    kept = "" if summaries is None else ", with summaries of blocks,"
                    what = f"decoding tokens {start} to {stop} of {length}{kept} differs from one pass"
                    same(step, whole[:, :, start:stop], what)


@holds_for()
def long_full_density(subject: Subject) -> None:
    """At full density it is dense softmax attention, at several hundred tokens."""
    need(subject.can.exact_at_full_density, "not exact at full density")
    for module, other, length in _settings(subject, full_density=True):
        case = other.case(length, length, holes=0.1)
        with torch.no_grad():
            expected = attend(case, case.allowed(), other.head_dim**-0.5)
            real = case.real_rows()
            what = f"full density differs from softmax written out, at {case.q.shape[2]} tokens"
            same(case.out(module) * real, expected * real, what)
