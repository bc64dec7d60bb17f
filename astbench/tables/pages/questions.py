"""Questions over documents: F1 and exact match, a row a run."""

from __future__ import annotations

from collections.abc import Mapping

from astbench.errors import DataError
from astbench.tables import labels
from astbench.tables.layout import Row, Table
from astbench.tables.pages import cells
from astbench.tables.records import Group, Run

HEAD = (
    "attention",
    "start",
    "F1, %",
    "exact match, %",
    "density",
    "training steps",
    "training, minutes",
    "seed",
)


def tables(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """One table; columns in which every row says the same are left out where that leaves eight with the number."""
    runs = sorted(group.runs, key=_order)
    rows = [Row(_cells(run, groups), (run,)) for run in runs]
    dull = next((name for name in ("start", "seed") if len({row.cells[HEAD.index(name)] for row in rows}) == 1), None)
    kept = [i for i, head in enumerate(HEAD) if head != dull]
    rows = [Row(tuple(row.cells[i] for i in kept), row.runs) for row in rows]
    head = tuple(HEAD[i] for i in kept)
    words = 2 if "start" in head else 1
    guess = {run.metrics["title_f1"] for run in runs if run.metrics.get("title_f1")}
    if len(guess) == 1:
        empty = ("",) * (len(head) - 3)
        rows.append(Row(("always the article's title", "", f"{guess.pop():.1f}", *empty)))
    return [Table(group.name, group.title, head, words, tuple(rows))]


def short(group: Group) -> Table:
    """The attentions that the table.yaml names, in that order: means over the seeds of rows that are not stale.

    Raises:
        DataError: no run of one of them.
    """
    rows = []
    for name in group.short:
        runs = [run for run in group.runs if run.attention["name"] == name and not run.entry.stale]
        by_seed = list({run.record["seed"]: run for run in runs}.values())
        if not by_seed:
            raise DataError(f"the short table of {group.name} wants {name}, and no run of it is there")
        f1 = cells.mean(run.metrics["f1"] for run in by_seed)
        density = cells.mean((run.density for run in by_seed), 2)
        rows.append(Row((f"`{name}`", f1, density, str(len(by_seed))), tuple(by_seed)))
    head = ("attention", "F1, %, mean of the seeds", "density", "seeds")
    return Table(f"{group.name}.short", group.title, head, 1, tuple(rows))


def _order(run: Run) -> tuple[str, float, float]:
    """Questions from scratch by attention, else by how long they were trained and how good they are."""
    if run.record["config"].get("init_from") or run.record["config"]["data"]["source"] != "demo":
        return "", run.steps, -run.metrics["f1"]
    return str(run.attention["name"]), run.record["seed"], run.steps


def _cells(run: Run, groups: Mapping[str, Group]) -> tuple[str, ...]:
    train = run.record.get("train")
    return (
        labels.name(run),
        labels.start(run, groups),
        f"{run.metrics['f1']:.1f}",
        f"{run.metrics['em']:.1f}",
        f"{run.density:.2f}",
        str(run.steps),
        f"{train['wall_seconds'] / 60:.0f}" if train else "-",
        str(run.record["seed"]),
    )
