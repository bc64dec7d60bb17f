"""Transforms of attention weights: relative loss over the share of zeros, and over bits, against the same run without.

Every loss is paired over the items that both runs scored; one run without a transform for each attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from astbench.errors import DataError
from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.pages.sweeps import NAMES, SCORES
from astbench.tables.records import Group, Run
from astbench.tables.student import interval

_HEAD = ("attention", "transform", "zeros", "values", "a row sums to")


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """Of each attention: pruning alone by the share of zeros, quantised values by bits, other transforms.

    Raises:
        DataError: a run without a transform is missing, or scored other items.
    """
    metric = next((metric for metric in SCORES if metric in group.runs[0].metrics), None)
    if metric is None:
        raise DataError(f"records of {group.name} hold none of the metrics {', '.join(SCORES)}")
    plain = {str(run.attention["name"]): run for run in group.runs if transform_of(run) is None}
    changed = sorted((run for run in group.runs if transform_of(run) is not None), key=_order)
    return [_table(group.name, group.title, metric, plain, changed)]


def transform_of(run: Run) -> dict[str, Any] | None:
    """What the record says of the run's transform; None where there was none."""
    found = run.record.get("transform")
    return None if found is None else dict(found)


def relative_loss(run: Run, other: Run, metric: str) -> list[float]:
    """What each item lost, as a share: of its perplexity, or of the other run's mean score.

    Raises:
        DataError: they scored other items.
    """
    item, mine, theirs = SCORES[metric], run.items(), other.items()
    if mine.keys() != theirs.keys():
        raise DataError(f"{run.folder} and {other.folder} scored other items")
    gaps = [float(mine[key][item]) - float(theirs[key][item]) for key in mine]
    if metric == "perplexity":
        return gaps
    mean = fmean(float(theirs[key][item]) for key in theirs)
    return [-gap / mean for gap in gaps] if mean else gaps


def _table(name: str, caption: str, metric: str, plain: Mapping[str, Run], runs: Sequence[Run]) -> Table:
    rows = []
    for attention in dict.fromkeys(str(run.attention["name"]) for run in runs):
        if attention not in plain:
            raise DataError(f"{name} needs a run of {attention} without a transform, to compare with")
        base = plain[attention]
        told = (labels.name(base), "none", f"{1 - base.density:.3f}", "", "1.000")
        rows.append(Row((*told, f"{base.metrics[metric]:.2f}", ""), (base,)))
        rows += [
            Row((*_told(run), f"{run.metrics[metric]:.2f}", _lost(relative_loss(run, base, metric), metric)), (run,))
            for run in runs
            if run.attention["name"] == attention
        ]
    head = (*_HEAD, NAMES[metric], "relative loss (95%, Student over the items)")
    return Table(name, caption, head, 2, tuple(rows))


def _told(run: Run) -> tuple[str, ...]:
    found = transform_of(run)
    assert found is not None
    values = "more than 64" if found["values"] is None else str(found["values"])
    return labels.name(run), _said(run), f"{found['zeros']:.3f}", values, f"{found['row_sum']:.3f}"


def _said(run: Run) -> str:
    """`log3bit, threshold 0.001, 3 bits`."""
    options = _options(run)
    parts = [str(options["name"])]
    if options.get("zeros"):
        parts.append(f"share {options['zeros']:g} by {options['scope']}")
    elif "threshold" in options:
        parts.append(f"threshold {options['threshold']:g}" if options["threshold"] else "no threshold")
    if options.get("bits"):
        parts.append(f"{options['bits']} bits")
    others = ("name", "zeros", "scope", "threshold", "bits")
    parts += [f"{k.replace('_', ' ')} {v}" for k, v in options.items() if k not in others and v is not None]
    return ", ".join(parts)


def _options(run: Run) -> dict[str, Any]:
    return dict(run.record["config"].get("transform") or {})


def _order(run: Run) -> tuple[int, bool, float, int]:
    """Pruned by the share of zeros, then in bits, unpruned scales first, then the others."""
    options, found = _options(run), transform_of(run)
    assert found is not None
    bits = options.get("bits")
    kind = 2 if bits is None else int(bits > 0)
    return kind, bool(options.get("threshold", 1)), 0.0 if bits else float(found["zeros"]), bits or 0


def _lost(gaps: Sequence[float], metric: str) -> str:
    middle, (low, high) = fmean(gaps), interval(gaps) if len(gaps) > 1 and stdev(gaps) else (fmean(gaps),) * 2
    if metric == "perplexity":
        middle, low, high = math.expm1(middle), math.expm1(low), math.expm1(high)
    return f"{100 * middle:+.1f}% ({100 * low:+.1f} to {100 * high:+.1f})"
