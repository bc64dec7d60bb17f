"""Does a record say what its run left: its options fit their hash, its scores the items beside it.

A corpus's BLEU and chrF, and bits per byte, cannot be computed from the items. Imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from astbench.errors import DataError
from astbench.runs.record import config_hash, former_config_hash

OF_A_CORPUS = ("bleu", "chrf")
BY_PLACE = ("accuracy_by_distance", "accuracy_by_depth")
_SCORED = re.compile(r"([\d,]+) tokens scored of .*?(?:the same nll over ([\d,]+) words|$)", re.DOTALL)


def check_options(file: Path, record: Mapping[str, Any]) -> None:
    """Refuse options that are not those of the run.

    Raises:
        DataError: naming the record and the field.
    """
    config, said = record["config"], record["config_hash"]
    if said not in (found := (config_hash(config), former_config_hash(config))):
        raise DataError(
            f"{file}: config_hash is {said} and its config has {found[0]}: one of the two was edited; "
            "take the record as the run wrote it"
        )
    for field, said, expected, what in _said_twice(record):
        if said != expected:
            raise DataError(
                f"{file}: {field} is {said} and {what} {expected}: one of the two was edited; take the record as the "
                "run wrote it"
            )


def _said_twice(record: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """What a record says in two places: field, value, the other's value and its name."""
    config, train, density = record["config"], record.get("train") or {}, record.get("density") or {}
    if "seed_everything" in config:
        yield "seed", record.get("seed"), config["seed_everything"], "config.seed_everything"
    steps = (config.get("trainer") or {}).get("max_steps", -1)
    if record["command"] == "fit" and record.get("state") == "done" and "steps" in train and steps > 0:
        yield "train.steps", train["steps"], steps, "config.trainer.max_steps"
    heads = [head for layer in (density.get("layers") or {}).values() for head in layer]
    if heads and density.get("mean") is not None and abs(density["mean"] - fmean(heads)) > 1e-4:
        yield "density.mean", density["mean"], round(fmean(heads), 5), "the mean of density.layers"


def check_apart(group: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse one run's record under two names.

    Args:
        group: Their folder.
        records: By name.

    Raises:
        DataError: naming both.
    """
    known: dict[tuple[Any, ...], str] = {}
    for name, record in records.items():
        moment = tuple(str(record.get(key)) for key in ("started", "wall_seconds", "peak_memory", "load"))
        if record.get("wall_seconds") is None and record.get("load") is None:
            continue  # nothing tells two of these apart but what they hold
        if moment in known:
            raise DataError(f"{group}: {known[moment]} and {name} are records of one run, {record.get('started')}")
        known[moment] = name


def check_scores(file: Path, record: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Refuse scores that the items do not give.

    Raises:
        DataError: naming the record and the field.
    """
    if record["command"] == "deploy-test":
        _check_load(file, record, items)
        return
    metrics = record.get("metrics") or {}
    expected = {f"metrics.{name}": value for name, value in _of_items(record, metrics, items).items()}
    said = {f"metrics.{name}": value for name, value in metrics.items()}
    for name in BY_PLACE:
        if name in record:
            cells = record[name].values()
            right = sum(cell["accuracy"] * cell["count"] for cell in cells)
            said[name], expected[name] = right / sum(cell["count"] for cell in cells), expected["metrics.accuracy"]
    for name, value in expected.items():
        if not math.isclose(said[name], value, rel_tol=1e-6, abs_tol=1e-9):
            raise DataError(
                f"{file}: {name} is {said[name]:.6g} and items.json beside it gives {value:.6g}: one of the two was "
                "edited; take both as the run wrote them"
            )


def _of_items(record: Mapping[str, Any], metrics: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that the items decide."""
    rows = list(items.values())
    means = {
        name: fmean(row[name] for row in rows)
        for name in metrics
        if rows and name not in OF_A_CORPUS and all(isinstance(row, dict) and name in row for row in rows)
    }
    if "perplexity" not in metrics or "nll" not in metrics:
        return means
    scored = _SCORED.search(str(record.get("signature")))
    tokens, words = (int((number or "0").replace(",", "")) for number in (scored.groups() if scored else ("", "")))
    if all("tokens" in row for row in rows) and rows:
        means["nll"] = sum(row["nll"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    elif tokens != len(rows) * (record["config"]["data"]["context"] - 1):
        means["nll"] = metrics["nll"]  # windows of other lengths, in a record from before their tokens were kept
    means["perplexity"] = math.exp(means["nll"])
    if words and "word_perplexity" in metrics:
        means["word_perplexity"] = math.exp(means["nll"] * tokens / words)
    return means


def _check_load(file: Path, record: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Latencies, goodput and all else that the requests beside a record give; intervals are drawn, and may differ."""
    from astbench.loadtest.kept import load_part
    from astbench.loadtest.objective import Objective

    config = record["config"]
    try:
        expected = dict(_leaves(load_part(items, Objective(**config.get("slo", {})), config["seed"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: items.json beside it holds no requests of a deployment test: {error}") from error
    said = dict(_leaves({name: record.get(name) for name in ("load", "alone") if name in record}))
    for name in {**expected, **said}:
        one, other = said.get(name), expected.get(name)
        close = isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other)
        if not close and one != other and not name.endswith((".low", ".high")):
            raise DataError(
                f"{file}: {name} is {one} and items.json beside it gives {other}: one of the two was edited; "
                "take both as the run wrote them"
            )


def _leaves(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
