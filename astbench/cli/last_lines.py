"""What a run says of itself when it is done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from astbench import console
from astbench.runs.folder import LAST, RECORD, RunFolder
from astbench.tasks import Task
from astbench.training.module import TaskModule


def say_last_lines(task: Task, module: TaskModule, record: Mapping[str, Any], folder: RunFolder) -> None:
    """Print the answers and metrics, what was attended to, and where everything lies."""
    rows: dict[str, object] = dict(module.answers)
    for name, value in record.get("metrics", {}).items():
        rows[name] = f"{value:.2f}" if isinstance(value, float) else value
    if (density := record.get("density", {}).get("mean")) is not None:
        tiles = record["density"].get("tiles")
        computed = "" if tiles is None else f" ({tiles:.3f} of the tiles)"
        rows["density"] = (
            f"{density:.3f} of the visible (query, key) pairs{computed}, on {', '.join(record['backends'])}"
        )
    if transform := record.get("transform"):
        values = transform["values"]
        told = f"{values} different values" if values else "more than 64 different values"
        rows["transform"] = (
            f"{transform['zeros']:.3f} of the visible pairs are zero, {told}, a row sums to {transform['row_sum']:.3f}"
        )
    if depth := record.get("depth"):
        rows["depth"] = (
            f"{depth['mean_layers']:.2f} of {depth['layers']} layers on average, {depth['share']:.3f} of their "
            f"operations, {depth['paths']} different paths"
        )
    if "train" in record:
        train = record["train"]
        wanted = module.trainer.max_steps
        short = f", of {wanted} asked for" if train["steps"] < wanted else ""
        rows["training"] = f"{train['steps']} steps in {train['wall_seconds']:.0f} s{short}"
    rows["record"] = folder / RECORD
    for name, file in (("items", "items.json"), ("checkpoint", LAST)):
        if (folder / file).exists():
            rows[name] = folder / file
    if record.get("picture"):
        rows["picture"] = folder / str(record["picture"])
    console.say(f"done: {record.get('signature', record['command'])}")
    console.table(rows)
    if record["command"] == "fit":
        for note in module.swapped.slots[0].attention.config.notes(module.trainer.max_steps):
            console.say(f"  note: {note}")
    if record["command"] == "fit" and record["data"]["source"] == "demo":
        plugins = [f"--plugins={plugin}" for plugin in record["config"].get("plugins") or []]
        names = shlex.join([f"--attention={module.swapped.name}", f"--task={task.name}", *plugins])
        console.say(f"  on the real data: astbench fit {names} {task.real}")
