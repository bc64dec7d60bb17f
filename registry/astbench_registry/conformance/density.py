"""The conformance suite's properties of what a variant reports of a call: statistics and density."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from astbench_registry.conformance.cases import SHORT, SHORT_KEYS, Case, Subject
from astbench_registry.conformance.checks import demand, holds_for
from astbench_registry.interface import Attention

DRAWS = 12
"""Of inputs at most: half of a ReLU's pairs are zero in one draw, and one in 4,096 is in all."""


@holds_for()
def density(subject: Subject) -> None:
    """Every pair that moves an output is counted, and of those that are counted none never does.

    A pair (query i, key j) moves an output where row i has a gradient to value j. Weights may be zero by chance, as
    with a ReLU, so what no draw of the inputs moves is what never does. Where pooled keys stand for many, or scores
    weigh what was chosen, keys move outputs that were not attended to: there only the second half is asked for.
    """
    module = subject.build()
    ever: Tensor | None = None
    least: Tensor | None = None
    for seed in range(DRAWS):
        case = subject.case(SHORT, SHORT_KEYS, batch=1, seed=seed)
        case = replace(case, q=case.q * 0.5)  # no weight so small that rounding hides it
        with torch.no_grad():
            stats = case.run(module, collect_stats=True).stats
        demand(stats is not None, "no statistics although they were asked for")
        assert stats is not None, "demanded above"
        moved, counted = _moved(module, case, hidden=subject.can.needs_hidden_states), stats.attended[0]
        if stats.coarse is None and not subject.can.soft_choice:
            for head, (number, reported) in enumerate(zip(moved.sum((1, 2)).tolist(), counted.tolist(), strict=True)):
                what = f"head {head} reports {reported:.0f} pairs attended to, but {number} move its output"
                demand(number <= reported, what)
        ever = moved if ever is None else ever | moved
        least = counted if least is None else torch.minimum(least, counted)
        if seed >= 2 and bool((ever.sum((1, 2)) >= least).all()):
            break
    assert ever is not None and least is not None, "there are draws"
    for head, (number, reported) in enumerate(zip(ever.sum((1, 2)).tolist(), least.tolist(), strict=True)):
        what = f"head {head} reports {reported:.0f} pairs attended to, but only {number} ever move its output"
        demand(number >= 0.98 * reported, what)


def _moved(module: Attention, case: Case, *, hidden: bool) -> Tensor:
    """Bool `(heads, queries, keys)`: row i of a head has a gradient to value j.

    With `hidden` also to token j of the layer's input, from which some variants make values of their own.
    """
    rows, heads = case.q.shape[2], case.q.shape[1]
    copies = case.tensors(lambda x: x.expand(rows, *x.shape[1:]))  # copy i for row i
    values, states = copies.v.clone().requires_grad_(), copies.hidden.clone().requires_grad_(hidden)
    out = replace(copies, v=values, hidden=states).out(module)
    own = out[torch.arange(rows), :, torch.arange(rows)].sum((0, 2))  # (heads,)
    each = heads // values.shape[1]
    if not hidden:  # heads of different key/value heads have their gradients apart: one pass for all of them
        passes = (torch.autograd.grad(own[i::each].sum(), values, retain_graph=True)[0] for i in range(each))
        return torch.stack([grad.abs().amax(-1) > 1e-12 for grad in passes], 2).flatten(1, 2).transpose(0, 1)
    found = []
    for head in range(heads):
        grad, seen = torch.autograd.grad(own[head], (values, states), retain_graph=True, allow_unused=True)
        moved = grad[:, head // each].abs().amax(-1) > 1e-12
        found.append(moved if seen is None else moved | (seen.abs().amax(-1) > 1e-12))
    return torch.stack(found)
