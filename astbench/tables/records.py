"""Records as tables read them: groups of runs, and what a `table.yaml` beside them adds. Imports nothing heavy.

A group is a folder `results/NAME` with a folder for every run. Its `table.yaml` says what the records cannot: what
was measured, which rows are stale, what lies in the folders that runs name. It names every record by its folder and
its configuration's hash, so that one that is missing, new or another is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from astbench.errors import DataError
from astbench.files.paths import other_kind
from astbench.files.plain_yaml import plain_yaml
from astbench.files.text import read_text
from astbench.runs.record import SCHEMA
from astbench.tables.integrity import check_apart, check_options, check_scores
from astbench_registry.registry import current_names

Record = dict[str, Any]

RECORD, SIDECAR, ITEMS = "record.json", "table.yaml", "items.json"


@dataclass(frozen=True)
class Entry:
    """What `table.yaml` says of one record.

    Attributes:
        config_hash: The record's, so that an entry cannot come to mean another run.
        said: What the row's label adds.
        stale: Why the row is not what the code would measure now; it gets a dagger with the record's date.
        stale_in: Tables of the page in which it is stale; all of them if empty.
        stale_rows: Rows of a bench that are stale, by their attention; all of them if empty.
        also: Options that came after the record and the values that say what it did, `{attention.detach: false}`.
    """

    config_hash: str
    said: str = ""
    stale: str = ""
    stale_in: tuple[str, ...] = ()
    stale_rows: tuple[str, ...] = ()
    also: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run: its record, and what is said of it beside it."""

    group: str
    name: str
    folder: Path
    record: Record
    entry: Entry

    @property
    def date(self) -> str:
        """Day on which it started, `2026-11-24`."""
        return str(self.record["started"])[:10]

    @property
    def attention(self) -> dict[str, Any]:
        """The attention's options as they ran, `name` among them."""
        return current_names(self.record["config"]["attention"])

    @property
    def metrics(self) -> dict[str, float]:
        """What the run was scored with."""
        return dict(self.record["metrics"])

    @property
    def density(self) -> float:
        """Share of the visible (query, key) pairs that was attended to."""
        return float(self.record["density"]["mean"])

    @property
    def tiles(self) -> float | None:
        """Share of tiles that a kernel has to compute, of runs whose lists are carried."""
        share = self.record["density"].get("tiles")
        return None if share is None else float(share)

    @property
    def steps(self) -> int:
        """Training steps; 0 for a run that only evaluates."""
        return int(self.record.get("train", {}).get("steps", 0))

    @property
    def memory(self) -> int | None:
        """Peak bytes of the GPU, or of the process where there was none; None of records that do not say."""
        held = self.record.get("peak_memory") or {}
        found = held.get("gpu_bytes") or held.get("cpu_bytes")
        return None if found is None else int(found)

    def flops(self, part: str) -> dict[str, Any]:
        """Operations and tokens of its `training` or `evaluation`; empty of records from before they were counted."""
        return dict(self.record.get("flops", {}).get(part) or {})

    def items(self) -> dict[str, Any]:
        """What was scored, one by one.

        Raises:
            DataError: the file is missing or no JSON.
        """
        return self.beside(ITEMS)

    def beside(self, name: str) -> dict[str, Any]:
        """What another JSON file in the run's folder holds.

        Raises:
            DataError: the file is missing or no JSON.
        """
        return read_json(self.folder / name)


@dataclass(frozen=True)
class Group:
    """The runs of one folder and what its `table.yaml` says of them all.

    Attributes:
        name: The folder's name: what `astbench table NAME` takes and the page's file is called.
        kind: Which columns: a key of :data:`astbench.tables.page.KINDS`.
        title: The page's heading.
        scope: Sentences on what was measured, before the table.
        short: Attentions of the table `NAME.short`, for a README; none if empty.
        lengths: Tokens of the columns of benches; empty for the shortest, the middle and the longest.
        places: Folder that runs name -> what lies in it.
        runs: In the order of their names.
        left_out: Run that is in no table -> why.
    """

    name: str
    kind: str
    title: str
    scope: str
    short: tuple[str, ...]
    lengths: tuple[int, ...]
    places: dict[str, str]
    runs: tuple[Run, ...]
    left_out: dict[str, str]


_GROUP_KEYS = ("kind", "title", "scope", "short", "lengths", "places", "records", "left_out")


def read_groups(results: Path) -> dict[str, Group]:
    """Every group below a folder, by name.

    Raises:
        DataError: nothing there, an unreadable file, or a `table.yaml` that does not fit the records beside it.
    """
    if not results.is_dir():
        raise DataError(f"--results={results} is not a folder{other_kind(results)}")
    found = {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if (folder / SIDECAR).is_file() or any(folder.glob(f"*/{RECORD}")):
            found[folder.name] = read_group(folder)
    if not found:
        hint = f"; name the folder above it: --results={results.parent}" if any(results.glob(f"*/{RECORD}")) else ""
        raise DataError(f"--results={results} holds no NAME/RUN/{RECORD}{hint}")
    return found


def read_group(folder: Path) -> Group:
    """One group, of the records in a folder. Raises as :func:`read_groups`."""
    said = _sidecar(folder / SIDECAR)
    records = {file.parent.name: read_record(file) for file in sorted(folder.glob(f"*/{RECORD}"))}
    entries = _entries(folder / SIDECAR, said, records)
    left_out = {**_unfinished(records, entries), **_left_out(folder / SIDECAR, said, records)}
    runs = [
        Run(folder.name, name, folder / name, record, entries.get(name) or Entry(record["config_hash"]))
        for name, record in records.items()
        if name not in left_out
    ]
    check_apart(folder, {run.name: run.record for run in runs})
    for run in runs:
        check_options(run.folder / RECORD, run.record)
        _check_also(folder / SIDECAR, run)
        kept = run.record["command"] == "deploy-test" or (run.name in entries and run.record.get("metrics"))
        if kept or (run.folder / ITEMS).is_file():
            check_scores(run.folder / RECORD, run.record, run.items())
    first = next(iter(records.values()), None)
    return Group(
        name=folder.name,
        kind=str(said.get("kind") or (kind_of(first) if first else "")),
        title=str(said.get("title") or folder.name),
        scope=str(said.get("scope") or "").strip(),
        short=tuple(said.get("short") or ()),
        lengths=tuple(said.get("lengths") or ()),
        places=dict(said.get("places") or {}),
        runs=tuple(runs),
        left_out=left_out,
    )


def _check_also(file: Path, run: Run) -> None:
    """`also` says options that came after a record; it may not say others than the record."""
    config = run.record["config"]
    for key in run.entry.also:
        group, _, option = key.partition(".")
        if option in (config.get(group) or {}) if option else key in config:
            raise DataError(
                f"{file}: {run.name}: also says {key}, which its record holds; also is for options that came later"
            )


def kind_of(record: Record) -> str:
    """Which columns suit a record where no `table.yaml` says so: its task's, or `bench`.

    Raises:
        DataError: no table shows such records.
    """
    if record["command"] == "bench":
        return "decode" if record["config"].get("modes") == "decode" else "cost"
    if record["command"] == "deploy-test":
        return "deploy"
    kinds = {
        "triviaqa": "questions",
        "squad": "questions",
        "wikitext103": "seeds" if record["command"] == "fit" else "perplexity",
        "wmt14": "translation",
        "mqar": "mqar",
        "needle": "needle",
        "lm_eval": "sweep",
    }
    task = record["config"]["task"]["name"]
    if task not in kinds:
        raise DataError(f"no table shows records of task {task}; name a kind in {SIDECAR} beside them")
    return kinds[task]


def read_record(file: Path) -> Record:
    """A record that this version reads.

    Raises:
        DataError: no JSON, another schema, no record of a run, or one that names code.
    """
    record = read_json(file)
    if record.get("schema") != SCHEMA:
        raise DataError(f"{file} has schema {record.get('schema')}; this astbench reads {SCHEMA}")
    for key, kind in (("command", str), ("state", str), ("started", str), ("config_hash", str), ("config", dict)):
        if not isinstance(record.get(key), kind):
            raise DataError(f"{file} is no record of a run: it holds no {key}")
    if record["state"] == "done" and record["command"] not in ("bench", "deploy-test", "predict"):
        metrics = record.get("metrics")
        if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
            raise DataError(f"{file}: metrics must be numbers by name, got {str(metrics)[:80]}")
        for key, kinds in (("seed", int), ("data", dict), ("density", dict)):
            if not isinstance(record.get(key), kinds):
                raise DataError(f"{file}: {key} must be {kinds.__name__}, got {str(record.get(key))[:80]}")
    named = record["config"].get("attention")
    name = named.get("name") if isinstance(named, dict) else named
    if ":" in str(name):
        raise DataError(f"{file} names the attention {name}: of a record only registered names are taken, no code")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file beside a record holds.

    Raises:
        DataError: missing, or no mapping in JSON.
    """
    try:
        found = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no mapping")
    return found


def _sidecar(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        said = plain_yaml(read_text(file))
    except ValueError as error:
        raise DataError(f"{file} is no YAML: {error}") from error
    if not isinstance(said, dict):
        raise DataError(f"{file} holds no mapping")
    for key in said:
        if key not in _GROUP_KEYS:
            raise DataError(f"{file} takes no {key}; it takes {', '.join(_GROUP_KEYS)}")
    return said


def _entries(file: Path, said: dict[str, Any], records: dict[str, Record]) -> dict[str, Entry]:
    """The entries, checked against the records: each names one, and where there are any every record has one."""
    if "records" not in said:
        return {}
    entries = {str(name): _entry(file, str(name), value) for name, value in (said["records"] or {}).items()}
    for name, entry in entries.items():
        if name not in records:
            raise DataError(f"{file} names {name}, and {file.parent / name / RECORD} is not there")
        if records[name]["config_hash"] != entry.config_hash:
            raise DataError(
                f"{file} gives {name} the config_hash {entry.config_hash}, its record {records[name]['config_hash']}"
            )
    for name, record in records.items():
        if name not in entries and name not in (said.get("left_out") or {}):
            raise DataError(
                f"{file.parent / name / RECORD} stands in no table: add to {file}, under records, "
                f"{name}: '{record['config_hash']}' (or under left_out with a reason)"
            )
    return entries


def _entry(file: Path, name: str, value: Any) -> Entry:
    if isinstance(value, str):
        return Entry(value)
    known = [f.name for f in fields(Entry)]
    if not isinstance(value, dict) or "config_hash" not in value or not set(value) <= set(known):
        raise DataError(f"{file}: {name} must be a config_hash in quotes, or a mapping with some of {', '.join(known)}")
    lists = {key: tuple(value.get(key, ())) for key in ("stale_in", "stale_rows")}
    return Entry(**{**value, **lists})


def _left_out(file: Path, said: dict[str, Any], records: dict[str, Record]) -> dict[str, str]:
    left_out = {str(name): str(why) for name, why in (said.get("left_out") or {}).items()}
    for name in left_out:
        if name not in records:
            raise DataError(f"{file} leaves out {name}, and {file.parent / name / RECORD} is not there")
        if name in (said.get("records") or {}):
            raise DataError(f"{file} names {name} under records and under left_out")
    return left_out


def _unfinished(records: dict[str, Record], entries: dict[str, Entry]) -> dict[str, str]:
    found = {name: f"it ended as {record['state']}" for name, record in records.items() if record["state"] != "done"}
    for name in found:
        if name in entries:
            raise DataError(f"{name} cannot be a row, {found[name]}: list it under left_out")
    return found
