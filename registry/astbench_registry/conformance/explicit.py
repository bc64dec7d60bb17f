"""The conformance suite's property of explicit weights: what transforms of attention weights work on."""

from __future__ import annotations

import torch
from torch import Tensor

from astbench_registry.conformance.cases import SHORT, SHORT_KEYS, Subject
from astbench_registry.conformance.checks import demand, holds_for, need, same
from astbench_registry.interface import AttentionContext


@holds_for()
def explicit_weights(subject: Subject) -> None:
    """Explicit weights that nothing changes sum values to the same output, and are weights of visible pairs."""
    need(subject.can.yields_probabilities, "yields no probabilities")
    module, calls = subject.build(), []

    def look(weights: Tensor, visible: Tensor) -> Tensor:
        calls.append((weights, visible))
        return weights

    for case in (subject.case(SHORT, SHORT_KEYS), subject.case(SHORT, SHORT_KEYS, holes=0.3)):
        calls.clear()
        before = case.run(module, collect_stats=True)
        context = AttentionContext(collect_stats=True, hidden_states=case.hidden, transform=look)
        after = module(case.q, case.k, case.v, case.mask, context=context)
        demand(bool(calls), "the transform was not called")
        rows = case.real_rows()
        same(after.out * rows, before.out * rows, "explicit weights sum values to another output")
        demand(after.stats is not None and before.stats is not None, "no statistics although they were asked for")
        assert after.stats is not None and before.stats is not None
        same(after.stats.attended, before.stats.attended, "explicit weights report other attended pairs")
        for weights, visible in calls:
            demand(bool((weights >= 0).all()), "a weight below 0")
            demand(not bool((weights.masked_fill(visible, 0.0) != 0).any()), "a weight of a pair that the mask hides")
            total = weights.sum(-1)
            demand(
                bool(((total - 1).abs() < 1e-9).logical_or(total == 0).all()), "a row's weights do not sum to 1 or 0"
            )
        doubled = AttentionContext(hidden_states=case.hidden, transform=lambda weights, visible: 2 * weights)
        with torch.no_grad():
            twice = module(case.q, case.k, case.v, case.mask, context=doubled).out
        same(twice * rows, 2 * before.out * rows, "the output is not what transformed weights sum to")
