"""Translation: BLEU and chrF, all seeds of an attention in the same places in one row."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.pages import cells
from astbench.tables.records import Group, Run

HEAD = (
    "attention",
    "replaced",
    "density",
    "parameters of its own",
    "BLEU, mean of the seeds",
    "seeds (lowest to highest)",
    "chrF, mean of the seeds",
)


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """The highest mean first."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in group.runs:
        places = str(run.record["config"]["task"]["where"]).replace("_", " ").replace(",", ", ")
        found.setdefault((labels.described(run), places), []).append(run)
    rows = []
    for (name, places), runs in sorted(found.items(), key=lambda one: -fmean(r.metrics["bleu"] for r in one[1])):
        bleu = [run.metrics["bleu"] for run in runs]
        line = (
            name,
            places,
            cells.mean((run.density for run in runs), 3),
            cells.thousands(runs[0].record["parameters"]["attention"]),
            cells.mean(bleu),
            cells.spread(bleu),
            cells.mean(run.metrics["chrf"] for run in runs),
        )
        rows.append(Row(line, tuple(runs)))
    return [Table(group.name, group.title, HEAD, 2, tuple(rows))]
