"""What `backend=auto` makes of a call, in words, and the nearest call that was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from astbench_kernels.dispatch.measured import EFFICIENCIES, Efficiency
from astbench_kernels.dispatch.rules import TABLE, Row, Shapes, gather_of, triton_refusals

BEYOND = 2
"""How far, as a factor, a call's tokens and density may lie from measured ones for their R to be quoted."""


@dataclass(frozen=True)
class Explanation:
    """What `backend=auto` makes of a call.

    Attributes:
        row: The line of the table that decided.
        facts: What it looked at.
        share: Pairs attended to, over dense's; masked, the kernel computes all of them.
        measured: The nearest measured R, None where nothing comparable was measured.
        missing: Why not, in that case.
    """

    row: Row
    facts: list[str]
    share: float
    measured: Efficiency | None
    missing: str


def explain(shapes: Shapes) -> Explanation:
    """What `backend=auto` runs for such a call, why, and what it is known to cost against dense."""
    row = next(row for row in TABLE if row.holds(shapes))
    facts = triton_refusals(shapes)
    plural = "s share" if shapes.rows > 1 else " has"
    facts.append(f"{shapes.rows:,} query row{plural} a list of blocks of {shapes.block_size} keys")
    if row.backend == "gather":
        facts.append(f"a block meets {shapes.rows_met:,.2f} query rows on average")
    measured, missing = _nearest(shapes)
    return Explanation(row, facts, shapes.density, measured, missing)


def _nearest(shapes: Shapes) -> tuple[Efficiency | None, str]:
    """The measured call that is nearest to this one, or why there is none."""
    if shapes.device != "cpu":
        return None, f"no kernel was measured on {shapes.device}"
    if shapes.query_length != shapes.key_length:
        return None, "only calls with as many queries as keys were measured"
    kinds = {(m.dtype, m.head_dim, m.block_size, m.query_group, m.causal): m for m in EFFICIENCIES}
    kind = (shapes.dtype, shapes.head_dim, shapes.block_size, shapes.query_group, shapes.causal)
    if kind not in kinds:
        return None, f"measured: {'; '.join(_kind(m) for m in kinds.values())}; this call: {_kind(shapes)}"

    def distances(m: Efficiency) -> tuple[float, float]:
        return abs(math.log2(m.tokens / shapes.query_length)), abs(math.log2(m.density / shapes.density))

    alike = [m for m in EFFICIENCIES if (m.dtype, m.head_dim, m.block_size, m.query_group, m.causal) == kind]
    way = gather_of(shapes)
    as_measured = replace(shapes, batch=1, heads=4, kv_heads=4, list_heads=4)
    alike = [
        m
        for m in alike
        if gather_of(replace(as_measured, query_length=m.tokens, key_length=m.tokens, density=m.density)) == way
    ]
    if not alike:
        return None, f"these shapes were measured at other densities, where the schedule is not {way.replace('_', '-')}"
    best = min(alike, key=distances)
    if max(distances(best)) > math.log2(BEYOND):
        tokens, densities = [m.tokens for m in alike], [m.density for m in alike]
        return None, (
            f"measured: {min(tokens):,} to {max(tokens):,} tokens at densities {min(densities)} to {max(densities)}; "
            f"this call: {shapes.query_length:,} tokens at {shapes.density:.3g}"
        )
    return best, ""


def _kind(call: Efficiency | Shapes) -> str:
    mask = "causal" if call.causal else "bidirectional"
    return (
        f"{call.dtype}, heads of {call.head_dim}, blocks of {call.block_size}, "
        f"{call.query_group} quer{'y' if call.query_group == 1 else 'ies'} a list, {mask}"
    )
