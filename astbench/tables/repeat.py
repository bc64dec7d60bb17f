"""The command that repeats a record: the recipe that is nearest to what ran, and the options that make up the rest.

It is found by comparing options, not by names: of every recipe and of no recipe at all, what is in the recipe on top of
today's defaults is laid beside what the record holds, and the one with the fewest differences is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench.errors import DataError
from astbench.files.plain_yaml import plain_yaml
from astbench.files.text import read_text
from astbench.tables.defaults import Options, bench_defaults, defaults, flatten
from astbench.tables.records import Run

NO_EFFECT = ("attention.mass", "trainer.enable_progress_bar")
"""Options that change no number: one that old records hold and nothing reads, and one for who watches."""

TRAINS = ("optim.", "trainer.max_steps", "trainer.gradient_clip_val")
"""How options begin that change no number of a run that only evaluates."""

LONG = {
    "seed": "seed_everything",
    "attention": "attention.name",
    "task": "task.name",
    "transform": "transform.name",
    "depth": "depth.name",
    "backbone": "backbone.name",
}
"""Options that may be typed by a shorter name, by that name."""

_SHORT = {LONG[name]: name for name in ("seed", "attention", "task", "transform", "depth")}


@dataclass(frozen=True)
class Recipe:
    """A file below `recipes/`: its path as a command names it, and its options by group."""

    path: str
    config: dict[str, Any]

    @property
    def bench(self) -> bool:
        """It is for `astbench bench`."""
        return not isinstance(self.config.get("attention"), dict)


@dataclass(frozen=True)
class Repeat:
    """A command line that sets every option as the record has it.

    Attributes:
        command: fit, validate, test, bench or analyze; of a deployment test with its recipe.
        recipe: Path of the recipe; None if none is nearer than the defaults.
        options: What is given beside it, `group.option` -> value.
    """

    command: str
    recipe: str | None
    options: Options

    @staticmethod
    def typed(key: str) -> str:
        """An option's name as one types it."""
        return _SHORT.get(key, key)

    def line(self, without: Sequence[str] = ()) -> str:
        """As typed, options in `without` left out; folders that belong to one machine read FOLDER."""
        given = [f"--{self.typed(key)}={written(v)}" for key, v in self.options.items() if key not in without]
        return " ".join(["astbench", self.command, *([f"--config={self.recipe}"] if self.recipe else []), *given])


def read_recipes(folder: Path) -> list[Recipe]:
    """Every recipe below a folder, in the order of their paths; none where there is no such folder.

    Raises:
        DataError: a file that is no mapping.
    """
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            config = plain_yaml(read_text(file))
        except ValueError as error:
            raise DataError(f"{file} is no YAML: {error}") from error
        if not isinstance(config, dict):
            raise DataError(f"{file} holds no options")
        if "servers" in config:  # of `astbench deploy-test`, whose records name it
            continue
        found.append(Recipe((folder.name / file.relative_to(folder)).as_posix(), config))
    return found


def repeat(run: Run, recipes: Sequence[Recipe]) -> Repeat:
    """The command with the fewest options that repeats a run; recipes of its own attention win a draw."""
    command = run.record["command"]
    if command == "deploy-test":
        return Repeat(f"{command} {run.record['recipe']}", None, {})
    if command == "bench":
        found = list(_benches(run, recipes))
    else:
        found = list(_fits(run, recipes))
    recipe, options = min(
        found, key=lambda one: (len(one[1]), "attention.name" in one[1], one[0] is None, one[0] or "")
    )
    analysis = run.record.get("analysis")
    if analysis:
        return Repeat("analyze", recipe, options | {key: analysis[key] for key in ("batches", "rows")})
    return Repeat(command, recipe, options)


def _fits(run: Run, recipes: Sequence[Recipe]) -> Iterator[tuple[str | None, Options]]:
    recorded = flatten(run.record["config"])
    attention, task, source = (recorded[key] for key in ("attention.name", "task.name", "data.source"))
    plain = defaults(attention, task, source, recorded.get("transform.name"), recorded.get("depth.name"))
    wanted = {**plain, **recorded, **run.entry.also}
    usual = find_source(task)
    bare = {**plain, "attention.name": None, "task.name": None}
    if source != usual:
        bare["data.source"] = None  # it has to be said
    if run.record["command"] != "fit":
        wanted = {key: value for key, value in wanted.items() if not key.startswith(TRAINS)}
    if wanted["ckpt_path"]:  # what those weights started from does not matter any more
        wanted["init_from"] = None
    yield None, _differences(bare, wanted)
    for recipe in recipes:
        if not recipe.bench and _serves(recipe, task, source):
            yield recipe.path, _differences({**plain, **_laid_over(recipe, attention)}, wanted)


def find_source(task: str) -> str:
    """The source of data that a task takes when none is said."""
    from astbench.tasks import find_task

    return find_task(task).sources[0]


def _serves(recipe: Recipe, task: str, source: str) -> bool:
    config = recipe.config
    return bool(config["task"]["name"] == task and config.get("data", {}).get("source", find_source(task)) == source)


def _laid_over(recipe: Recipe, attention: str) -> Options:
    """The recipe's options; another attention than its own drops those of its attention, as the command line does."""
    flat = flatten(recipe.config)
    if flat["attention.name"] == attention:
        return flat
    return {key: value for key, value in flat.items() if key == "attention.name" or not key.startswith("attention.")}


def _differences(given: Options, wanted: Options) -> Options:
    """Options to add to what is given; the attention and the task first."""
    differs = {key: value for key, value in wanted.items() if key not in NO_EFFECT and given.get(key, ...) != value}
    first = [key for key in ("attention.name", "task.name", "transform.name", "depth.name") if key in differs]
    return {key: differs[key] for key in [*first, *(k for k in differs if k not in first)]}


def _benches(run: Run, recipes: Sequence[Recipe]) -> Iterator[tuple[str | None, Options]]:
    plain = bench_defaults()
    wanted = {**plain, **run.record["config"]}
    for recipe in (None, *(r for r in recipes if r.bench)):
        given = {**plain, **(recipe.config if recipe else {})}
        differs = {k: v for k, v in wanted.items() if k != "run_dir" and given[k] != v}
        yield recipe.path if recipe else None, differs


def written(value: Any) -> str:
    """A value as one writes it on a command line."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        return "FOLDER" if value.startswith("/") else _quoted(value)
    return _quoted(json.dumps(value, separators=(",", ":")))


def _quoted(word: str) -> str:
    plain = all(c.isalnum() or c in "_-./,:+" for c in word) and word != ""
    return word if plain else f"'{word}'"
