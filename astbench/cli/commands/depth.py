"""`astbench depth RUN...`: runs at several depths, the oracle path, and what depth costs at least."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench import console
from astbench.cli.own_parser import OwnParser
from astbench.errors import ConfigError, DataError

_USAGE = """usage: astbench depth RUN [RUN ...] [--groups N] [--plot FOLDER]

Finished runs with --depth on the same items: how deep each went, its share of the layers' operations, and how much was
right. Of the runs whose path is the same for every item, also the oracle path (of each item the cheapest that is right)
and the least share at which any choice among these paths could be as often right as each other run: if it knew which
are right, and if it saw no more than the predicted complexity. For paths of one model evaluate its weights at each:
astbench validate --init_from=RUN --depth=static --depth.path=[0,2]

  RUN            folders of finished runs
  --groups N     groups of equal size that the predicted complexity is told in (default: 10)
  --plot FOLDER  also write depth.svg and depth.png, accuracy over operations and layers over predicted complexity,
                 with the numbers in depth.csv and depth-groups.csv"""


@dataclass(frozen=True)
class _Deep:
    """One run.

    Attributes:
        name: Its folder.
        depth: What its record says of the depth.
        right: How much of each item is right, 0 to 1.
        complexity: Predicted of each item; empty where nothing is predicted.
        layers: That each item went through; empty where that was not written down.
        weights: The run that trained them.
    """

    name: str
    depth: dict[str, Any]
    right: dict[str, float]
    complexity: dict[str, float]
    layers: dict[str, int]
    weights: Path

    @property
    def fixed(self) -> bool:
        """Whether all items took one path."""
        return bool(self.depth["paths"] == 1 and not self.complexity)


def run(words: list[str]) -> int:
    """Print the comparison."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    if given.groups < 1:
        raise ConfigError(f"--groups must be at least 1, got {given.groups}")
    runs = [_read(folder) for folder in given.runs]
    for other in runs[1:]:
        if other.right.keys() != runs[0].right.keys():
            raise DataError(f"{other.name} and {runs[0].name} were evaluated on other items: compare like with like")
    console.say(f"  {'run':<28} {'policy':<20} {'layers':>7} {'share':>7} {'paths':>6} {'right':>7}")
    for one in runs:
        depth = one.depth
        console.say(
            f"  {one.name[-28:]:<28} {depth['name']:<20} {depth['mean_layers']:>7.2f} {depth['share']:>7.3f} "
            f"{depth['paths']:>6} {100 * _mean(one):>6.2f}%"
        )
    fixed, oracle = [one for one in runs if one.fixed], None
    if len(fixed) < 2:
        console.say("note: the oracle and the bounds need two runs or more whose path is the same for every item")
    else:
        oracle = _bounds(runs, fixed, given.groups)
    if given.plot is not None:
        _plot(runs, oracle, given.groups, given.plot)
    return 0


def _plot(runs: list[_Deep], oracle: tuple[float, float] | None, groups: int, folder: Path) -> None:
    import numpy as np

    from astbench.analysis.depth_bound import by_value
    from astbench.analysis.depth_figure import Group, Point, draw

    points = [Point(one.name, one.depth["name"], one.depth["share"], _mean(one)) for one in runs]
    if oracle is not None:
        points.append(Point("oracle", "oracle", *oracle))
    told = []
    for one in runs:
        if not one.complexity or one.complexity.keys() != one.right.keys() or one.layers.keys() != one.right.keys():
            continue
        rows = np.array([(one.complexity[item], one.layers[item], one.right[item]) for item in one.right])
        number = by_value(rows[:, 0].tolist(), min(groups, len(rows)))
        for place in np.unique(number).tolist():
            own = rows[number == place]
            told.append(Group(Path(one.name).name, place, len(own), *(round(float(x), 5) for x in own.mean(0))))
    folder.mkdir(parents=True, exist_ok=True)
    console.say(f"  {folder}: {', '.join(draw(points, told, folder))}")


def _bounds(runs: list[_Deep], fixed: list[_Deep], groups: int) -> tuple[float, float]:
    """Say them; share and accuracy of the oracle."""
    import numpy as np

    from astbench.analysis.depth_bound import by_value, cheapest_right, grouped, least_share

    items = list(runs[0].right)
    right = np.array([[one.right[item] for one in fixed] for item in items])
    costs = np.array([one.depth["share"] for one in fixed])
    share, accuracy = cheapest_right((right >= 1).astype(float), costs)
    console.say(f"  oracle path of these {len(fixed)}: share {share:.3f}, {100 * accuracy:.2f}% right")
    own, alike = np.full(len(items), 1 / len(items)), np.ones(1)
    for one in (r for r in runs if not r.fixed):
        wanted = _mean(one)
        told = {
            "any choice that knows what is right": least_share(right, costs, own, wanted),
            "any choice that knows nothing of the item": least_share(right.mean(0)[None], costs, alike, wanted),
        }
        if one.complexity.keys() == one.right.keys():
            group = by_value([one.complexity[item] for item in items], min(groups, len(items)))
            rows, weights = grouped(right, group)
            told["any choice by its complexity alone"] = least_share(rows, costs, weights, wanted)
        if any(path.weights != one.weights for path in fixed):
            console.say(f"note: {one.name} ran other weights than these paths; the least below is of theirs")
        console.say(f"  {one.name}: {100 * wanted:.2f}% right at share {one.depth['share']:.3f}; the least for it is")
        for who, least in told.items():
            console.say(f"    {'not reached with these paths' if least is None else f'{least:.3f}':<28} {who}")
    return share, accuracy


def _mean(one: _Deep) -> float:
    return sum(one.right.values()) / len(one.right)


def _read(folder: Path) -> _Deep:
    """A run that was evaluated with `--depth`.

    Raises:
        DataError: something else.
    """
    from astbench.runs.folder import DEPTHS, RECORD
    from astbench.tables.records import ITEMS, read_json, read_record
    from astbench.tasks import find_task

    record = read_record(folder / RECORD)
    if not isinstance(record.get("depth"), dict) or record["state"] != "done":
        raise DataError(f"{folder} is no finished run with --depth")
    metric = find_task(record["config"]["task"]["name"]).metric
    items = read_json(folder / ITEMS)
    if not items or not all(isinstance(row.get(metric), int | float) for row in items.values()):
        raise DataError(f"{folder}/{ITEMS} does not say how much of each item is right ({metric})")
    predicted = read_json(folder / DEPTHS) if (folder / DEPTHS).is_file() else {}
    complexity = {key: rows[0]["complexity"] for key, rows in predicted.items() if "complexity" in rows[0]}
    layers = {key: sum(row["path"].count("1") for row in rows) // len(rows) for key, rows in predicted.items()}
    right = {key: row[metric] / 100 for key, row in items.items()}
    given = record["config"].get("ckpt_path") or record["config"].get("init_from")
    weights = Path(given) if given and record["command"] != "fit" else folder
    weights = weights.parent if weights.suffix == ".ckpt" else weights
    return _Deep(str(folder), record["depth"], right, complexity, layers, weights.resolve())


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("depth")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    return parser.parse_args(words)
