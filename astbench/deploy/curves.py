"""Latency and goodput over the rate, a column a length: as SVG and PNG, with the numbers beside them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from astbench.analysis.figures import new_figure, save
from astbench.files.writing import write_text
from astbench.tables.pages.deploy import curves, knee_of
from astbench.tables.records import Group

NAME = "curves"


def draw(group: Group, folder: Path) -> list[str]:
    """Write the picture and its numbers into a folder; the files' names."""
    points = _points(group)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(points[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    write_text(folder / f"{NAME}.csv", out.getvalue())
    return [*save(_figure(group, points), folder, NAME), f"{NAME}.csv"]


def _points(group: Group) -> list[dict[str, Any]]:
    """A row a cell; empty where a percentile falls on a request that failed, or there are no tokens."""
    found = []
    for (length, server), cells in curves(group.runs).items():
        for run in cells:
            config, load = run.record["config"], run.record["load"]
            row = {"server": server, "tokens": length, "rate": config["rate"], "requests": load["requests"]}
            for name in ("ttft", "tpot", "latency"):
                for q in ("p50", "p95"):
                    row[f"{name}_{q}_s"] = (load.get(f"{name}_seconds") or {}).get(q, {}).get("value")
            row |= {f"{what}_per_second": load[f"{what}_per_second"] for what in ("throughput", "goodput")}
            found.append(row | {"good_share": load["good_share"], "knee": knee_of(cells).rate})
    return found


def _figure(group: Group, points: list[dict[str, Any]]) -> Any:
    lengths = list(dict.fromkeys(row["tokens"] for row in points))
    servers = list(dict.fromkeys(row["server"] for row in points))
    streamed = any(row["ttft_p50_s"] is not None for row in points)
    shown = [("first token, s", "ttft")] * streamed + [("whole answer, s", "latency")]
    figure = new_figure(1.6 + 3.0 * len(lengths), 1.2 + 2.3 * (len(shown) + 1), group.title)
    for column, length in enumerate(lengths):
        here = [row for row in points if row["tokens"] == length]
        for place, (what, name) in enumerate([*shown, ("answered well a second", "goodput")]):
            axes = figure.add_subplot(len(shown) + 1, len(lengths), place * len(lengths) + column + 1)
            for number, server in enumerate(servers):
                of_server = [row for row in here if row["server"] == server]
                style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "o", "markersize": 3}
                rates = [row["rate"] for row in of_server]
                if name == "goodput":
                    axes.plot(rates, [row["goodput_per_second"] for row in of_server], label=server, **style)
                    continue
                for q, line in (("p50", "-"), ("p95", ":")):
                    values = [row[f"{name}_{q}_s"] for row in of_server]
                    values = [float("nan") if value is None else value for value in values]
                    axes.plot(rates, values, line, label=f"{server} {q}", **style)
            if name == "goodput":
                top = max(row["rate"] for row in here)
                axes.plot([0, top], [0, top], color="grey", linewidth=0.7, linestyle="--", label="all that came")
            else:
                axes.set_yscale("log")
            if place == 0:
                axes.set_title(f"{length:,} tokens", fontsize=9)
            axes.set_xlabel("requests a second", fontsize=8)
            if column == 0:
                axes.set_ylabel(what, fontsize=8)
                axes.legend(fontsize=6)
            axes.tick_params(which="both", labelsize=7)
            axes.grid(alpha=0.3)
    return figure
