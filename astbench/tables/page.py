"""A page of results: what was measured on what, its tables, which rows are stale, and how each row repeats."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from astbench.errors import DataError
from astbench.tables import labels
from astbench.tables.layout import Row, Table, markdown, stale_runs
from astbench.tables.pages import (
    benches,
    chosen,
    deploy,
    depth,
    perplexity,
    questions,
    recall,
    scaling,
    sweeps,
    transforms,
    translation,
)
from astbench.tables.records import Group, Run
from astbench.tables.repeat import Recipe, Repeat, repeat

Maker = Callable[[Group, Mapping[str, Group]], list[Table]]

KINDS: dict[str, Maker] = {
    "questions": questions.tables,
    "perplexity": perplexity.untrained,
    "over_dense": perplexity.over_dense,
    "tiles": perplexity.tiles,
    "seeds": perplexity.seeds,
    "translation": translation.tables,
    "sweep": sweeps.tables,
    "scaling": scaling.tables,
    "depth": depth.tables,
    "transforms": transforms.tables,
    "chosen": chosen.tables,
    "mqar": recall.mqar,
    "needle": recall.needle,
    "cost": benches.cost,
    "decode": benches.decode,
    "kernel": benches.kernel,
    "speed": benches.speed,
    "deploy": deploy.tables,
}
"""`kind` of a table.yaml -> what makes the tables."""

SHORT: dict[str, Callable[[Group], Table]] = {
    "questions": questions.short,
    "over_dense": perplexity.short,
    "sweep": sweeps.short,
}
"""`kind` -> what makes the short table of a README."""


PICTURES = ("curves", "heads", "distance", "place", "tokens", "drift", "linguistics", "values", "values-heads")
"""Plots that a bench and an analysis leave beside their record."""

DENSITY = "Density is the share of the visible (query, key) pairs that was attended to."
"""Said on every page that has such a column."""


def tables_of(group: Group, groups: Mapping[str, Group]) -> list[Table]:
    """The tables of a group's page; none if every record is left out.

    Raises:
        DataError: an unknown kind, or records that lack what its columns need.
    """
    if not group.runs:
        return []
    if group.kind not in KINDS:
        raise DataError(f"results of {group.name}: kind must be one of {', '.join(KINDS)}, got {group.kind}")
    try:
        return KINDS[group.kind](group, groups)
    except KeyError as error:
        raise DataError(f"a record of {group.name} has no {error}, which tables of kind {group.kind} show") from error


def block(tables: Sequence[Table], numbered: bool = False) -> str:
    """Tables as Markdown, one below the other; captions where there are several."""
    if len(tables) == 1:
        return markdown(tables[0], numbered)
    return "\n".join(f"{table.caption}:\n\n{markdown(table, numbered)}" for table in tables)


def page(
    group: Group, groups: Mapping[str, Group], tables: Sequence[Table], recipes: Sequence[Recipe], at: Path
) -> str:
    """The whole page; `at` is the folder it is written to, from which its links start."""
    folder = group.runs[0].folder.parent
    parts = [
        f"<!-- Made from {folder.parent.name}/{group.name} by `astbench table {group.name} --write`; do not edit. -->",
        f"# {group.title}",
        *([group.scope] if group.scope else []),
        f"{machines(group.runs)} Every number is computed from the [records]({_link(folder, at)}).",
        *([DENSITY] if any(head.startswith("density") for table in tables for head in table.head) else []),
        block(tables, numbered=True).rstrip(),
        *_daggers(tables),
        *_drawn(folder, at),
        *_curves(tables[0], at),
        "## How each row repeats",
        *_repeats(group, groups, tables[0], recipes),
        *_left_out(group),
    ]
    return "\n\n".join(parts) + "\n"


def machines(runs: Sequence[Run]) -> str:
    """When and on which processors, in one sentence."""
    days = sorted({run.date for run in runs})
    hardware = [run.record["hardware"] for run in runs]
    chips = sorted({str(gpu) for h in hardware for gpu in h.get("gpus", [])})
    chips += sorted({f"{h['cpu']} ({h['cpu_capability']})" for h in hardware})
    cores, threads = ({int(h[what]) for h in hardware} for what in ("cores", "threads"))
    torch = sorted({str(run.record["versions"]["torch"]) for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"Measured {when} on {' and '.join(chips)}, {_or(cores, 'core')}, {_or(threads, 'thread')}, "
        f"torch {' and '.join(torch)}."
    )


def _or(numbers: Collection[int], unit: str) -> str:
    return f"{' or '.join(str(number) for number in sorted(numbers))} {unit}{'' if max(numbers) == 1 else 's'}"


def _link(target: Path, at: Path) -> str:
    return Path(os.path.relpath(target, at)).as_posix()


def _daggers(tables: Sequence[Table]) -> list[str]:
    """Why rows are stale: a line for each reason."""
    why: dict[str, dict[str, list[int]]] = {}
    for table in tables:
        for number, row in enumerate(table.rows, start=1):
            for run in stale_runs(row, table):
                where = f" ({table.caption})" if len(tables) > 1 and run.entry.stale_in else ""
                numbers = why.setdefault(f"{run.date}: {run.entry.stale}", {}).setdefault(where, [])
                numbers += [number] if number not in numbers else []
    return [
        f"† {_rows(sorted({n for numbers in places.values() for n in numbers}))}{''.join(places)}, measured {reason}"
        for reason, places in why.items()
    ]


def _rows(numbers: Sequence[int]) -> str:
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _drawn(folder: Path, at: Path) -> list[str]:
    """The picture of all records together, where there is one."""
    file = folder / "curves.svg"
    return [f"![Curves]({_link(file, at)})"] if file.is_file() else []


def _curves(table: Table, at: Path) -> list[str]:
    """Links to the plots beside the records, called by the rows that they belong to."""
    told = []
    for name in PICTURES:
        links = []
        for run in dict.fromkeys(run for row in table.rows for run in row.runs):
            file = run.folder / f"{name}.svg"
            if file.is_file():
                numbers = [number for number, row in enumerate(table.rows, start=1) if run in row.runs]
                links.append(f"[{_rows(numbers)}]({_link(file, at)})")
        if links:
            told.append(f"{name.capitalize()}: {', '.join(links)}.")
    return ["\n".join(told)] if told else []


def commands(row: Row, recipes: Sequence[Recipe]) -> list[str]:
    """The command lines that repeat a row: one for several seeds of the same options."""
    found: dict[str, list[tuple[Run, Repeat]]] = {}
    for run in row.runs:
        again = repeat(run, recipes)
        found.setdefault(again.line(without=["seed_everything"]), []).append((run, again))
    lines = []
    for line, runs in found.items():
        seeds = sorted({int(run.record["seed"]) for run, _ in runs})
        lines.append(runs[0][1].line() if len(seeds) == 1 else f"{line} --seed=N  # N = {', '.join(map(str, seeds))}")
    return lines


def _repeats(group: Group, groups: Mapping[str, Group], table: Table, recipes: Sequence[Recipe]) -> list[str]:
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(table.rows, start=1):
        for line in commands(row, recipes):
            numbers.setdefault(line, []).append(number)
    lines = [f"# {_rows(rows)}\n{line}" for line, rows in numbers.items()]
    if counted := [number for number, row in enumerate(table.rows, start=1) if not row.runs]:
        lines.append(f"# {_rows(counted)}: by each of these commands; every record holds it")
    return ["```sh\n" + "\n".join(lines) + "\n```", *_folders(group, groups, recipes), *_fingerprints(group)]


def _folders(group: Group, groups: Mapping[str, Group], recipes: Sequence[Recipe]) -> list[str]:
    """What lies in the folders that the runs name, and which command made those that are runs."""
    said: dict[str, str] = dict(group.places)
    for run in group.runs:
        source = labels.origin(run, groups)
        if source is not None:
            folder = str(source.record["config"]["run_dir"])
            said[folder] = f"the run of `{repeat(source, recipes).line()} --run_dir={folder}`"
    items = [f"- `{folder}`: {what}" for folder, what in said.items()]
    return ["What the commands expect in these folders:", "\n".join(items)] if items else []


def _fingerprints(group: Group) -> list[str]:
    """Which examples were read, by split."""
    found: dict[str, None] = {}
    for run in group.runs:
        data = run.record.get("data", {})
        of_split = dict(data.get("fingerprints", {}))
        train = data.get("train") or {}  # language models only; runs that only evaluate hold a null
        if "fingerprint" in train:
            of_split["train"] = train["fingerprint"]
        if "fingerprint" in data:
            of_split[run.record.get("split", "evaluated")] = data["fingerprint"]
        if of_split:
            found[", ".join(f"{split} `{digest}`" for split, digest in of_split.items())] = None
    return [f"Fingerprints of the examples, as the records hold them: {'; '.join(found)}."] if found else []


def _left_out(group: Group) -> list[str]:
    items = [f"- `{name}`: {why}" for name, why in group.left_out.items()]
    return ["Records that stand in no row:", "\n".join(items)] if items else []


def index(groups: Mapping[str, Group], digest: str) -> str:
    """The list of pages, and of groups that have none; the digest of the list of the records' own, if there is one."""
    counted = {g.name: f"{len(g.runs)} record{'s' if len(g.runs) > 1 else ''}" for g in groups.values()}
    shown = [f"- [{g.title}]({g.name}.md): {counted[g.name]}" for g in groups.values() if g.runs]
    others = [f"- `{g.name}/{run}`: {why}" for g in groups.values() if not g.runs for run, why in g.left_out.items()]
    parts = [
        "<!-- Made from the records by `astbench table --write`; not to be edited. -->",
        "# Results",
        "\n".join(shown),
        *(["Records on no page:", "\n".join(others)] if others else []),
        *([f"Every file of the records has its sha256 in `SHA256SUMS`, whose own is `{digest}`."] if digest else []),
    ]
    return "\n\n".join(parts) + "\n"
