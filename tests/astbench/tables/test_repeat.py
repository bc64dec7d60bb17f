"""The command behind every row makes the options that its record holds."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from astbench.tables.defaults import bench_defaults, defaults, flatten
from astbench.tables.documents import Book
from astbench.tables.page import commands
from astbench.tables.repeat import NO_EFFECT, TRAINS, read_recipes, repeat

ROOT = Path(__file__).parents[3]
BOOK = Book(ROOT / "results", ROOT / "docs", ROOT / "recipes")
ALL = [run for group in BOOK.groups.values() for run in group.runs]
DEPLOYED = [run for run in ALL if run.record["command"] == "deploy-test"]
RUNS = [run for run in ALL if run not in DEPLOYED]
RECIPES = read_recipes(ROOT / "recipes")
LONG = {"seed": "seed_everything", **{key: f"{key}.name" for key in ("attention", "task", "transform", "depth")}}


def value(text):
    """A value as the command line reads it: YAML, whose floats need no dot (1e-12)."""
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?e-?\d+", text) else yaml.safe_load(text)


def typed(line):
    """(command, recipe's options, the other options) of a command line, read as a shell and YAML read it."""
    astbench, command, *words = shlex.split(line, comments=True)
    assert astbench == "astbench"
    given = dict(word.removeprefix("--").split("=", 1) for word in words)
    recipe = given.pop("config", None)
    config = yaml.safe_load((ROOT / recipe).read_text()) if recipe else {}
    return command, config, {LONG.get(key, key): value(text) for key, text in given.items()}


def test_deployment_tests_name_the_recipe_whose_folder_they_left():
    assert DEPLOYED
    for run in DEPLOYED:
        command, file = repeat(run, RECIPES).line().removeprefix("astbench ").split()
        assert command == "deploy-test"
        assert Path(yaml.safe_load((ROOT / file).read_text())["folder"]).name == run.group


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.group}/{run.name}")
def test_command_makes_the_recorded_options(run):
    command, config, given = typed(repeat(run, RECIPES).line())
    analysis = run.record.get("analysis")
    if analysis:  # of the evaluation that it came with
        assert command == "analyze" and run.record["command"] == "validate"
        command = "validate"
        assert {key: given.pop(key) for key in ("batches", "rows")} == {
            key: analysis[key] for key in ("batches", "rows")
        }
    assert command == run.record["command"]
    if command == "bench":
        given = {("attention" if key == "attention.name" else key): value for key, value in given.items()}
        wanted = {key: value for key, value in run.record["config"].items() if key != "run_dir"}
        usual = bench_defaults()
        made = {**usual, **config, **given}
    else:
        wanted = {**flatten(run.record["config"]), **run.entry.also}
        own = flatten(config) if config else {}
        if own.get("attention.name") != given.get("attention.name", own.get("attention.name")):
            own = {key: value for key, value in own.items() if not key.startswith("attention.")}
        if own.get("depth.name") != given.get("depth.name", own.get("depth.name")):
            own = {key: value for key, value in own.items() if not key.startswith("depth.")}
        names = (wanted[key] for key in ("attention.name", "task.name", "data.source"))
        usual = defaults(*names, transform=wanted.get("transform.name"), depth=wanted.get("depth.name"))
        made = {**usual, **own, **given}
    ignored = NO_EFFECT + (TRAINS if command in ("validate", "test") else ())
    ignored += ("init_from",) if wanted.get("ckpt_path") else ()  # those weights are evaluated
    wanted = {key: value for key, value in wanted.items() if not key.startswith(ignored)}
    assert {key: made.get(key, "not said") for key in wanted} == wanted
    later = [key for key in made if key not in wanted and key != "run_dir" and not key.startswith(ignored)]
    assert {key: made[key] for key in later} == {key: usual[key] for key in later}, "options that came after the record"


def test_every_row_has_a_command():
    rows = [row for tables in BOOK.tables.values() for row in tables[0].rows if row.runs]
    assert all(commands(row, RECIPES) for row in rows)
    lines = [line for row in rows for line in commands(row, RECIPES)]
    assert len([line for line in lines if "--config=recipes/" in line]) > 0.9 * len(lines)
    assert not [line for line in lines if "=/" in line or "'/" in line], "a folder of one machine"


def test_without_recipes_every_option_is_said():
    run = next(run for run in RUNS if run.name == "smollm2-ast-d0.125-g16")
    again = repeat(run, [])
    assert again.recipe is None
    assert {"attention.name": "ast", "task.name": "wikitext103", "data.windows": 4}.items() <= again.options.items()
    assert repeat(run, RECIPES).options.keys() < again.options.keys()


def test_absolute_folders_are_not_printed():
    run = next(run for run in RUNS if run.name == "smollm2-dense")
    run = type(run)(run.group, run.name, run.folder, json.loads(json.dumps(run.record)), run.entry)
    run.record["config"]["data"]["path"] = "/somebody/data"
    assert "--data.path=FOLDER" in repeat(run, RECIPES).line()


CALLS = [
    ["fit", "--attention=ast", "--task=triviaqa"],
    ["validate", "--attention=dense", "--task=squad", "--data.source=local"],
    ["fit", "--attention=local", "--task=mqar", "--seed=1"],
    ["test", "--attention=moba", "--task=wikitext103", "--data.source=hub"],
]
PARSED = """
import contextlib, io, json, sys
from astbench.cli import main
found = []
for call in json.loads(sys.stdin.read()):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*call, "--print_config"])
    found.append(out.getvalue())
print(json.dumps(found))
"""


def parsed(calls, cwd):
    done = subprocess.run(
        [sys.executable, "-c", PARSED], input=json.dumps(calls), cwd=cwd, capture_output=True, text=True, check=True
    )
    return [flatten(yaml.safe_load(text)) for text in json.loads(done.stdout)]


def test_defaults_are_those_of_the_command_line(tmp_path):
    for call, found in zip(CALLS, parsed(CALLS, tmp_path), strict=True):
        names = (found[key] for key in ("attention.name", "task.name", "data.source"))
        assert {**defaults(*names), "seed_everything": found["seed_everything"]} == found, call


@pytest.mark.slow
def test_commands_resolve_to_the_recorded_options():
    """The same as above by the command line's own parser."""
    runs = [run for run in RUNS if run.record["command"] != "bench"]
    calls = [shlex.split(repeat(run, RECIPES).line())[1:] for run in runs]
    for run, found in zip(runs, parsed(calls, ROOT), strict=True):
        wanted = {**flatten(run.record["config"]), **run.entry.also}
        ignored = NO_EFFECT + (TRAINS if run.record["command"] != "fit" else ())
        wanted = {key: value for key, value in wanted.items() if not key.startswith(ignored)}
        assert {key: found.get(key, "not said") for key in wanted} == wanted, run.name
