"""`astbench reproduce`: the command behind a row, and what it says of what came out."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from astbench.cli.commands import reproduce
from astbench.runs.record import config_hash
from astbench.tables.documents import Book
from astbench.tables.records import read_groups
from astbench.tables.verdict import verdict
from tests.astbench.cli.commands import FIT

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def recorded(run, tmp_path_factory):
    """A folder of results with one real run."""
    folder = tmp_path_factory.mktemp("reproduced")
    code, said = run([*FIT, f"--run_dir={folder / 'run'}"])
    assert code == 0, said
    kept = folder / "results" / "mine" / "first"
    kept.mkdir(parents=True)
    for name in ("record.json", "items.json"):
        shutil.copy(folder / "run" / name, kept / name)
    return folder / "results"


@pytest.fixture
def ran(recorded, tmp_path, monkeypatch):
    """Stands in for the command: leaves the recorded run, changed by `change(record, items)`."""
    monkeypatch.chdir(tmp_path)
    state = SimpleNamespace(words=None, change=lambda record, items: None, code=0)

    def start(words, **_):
        state.words = words[3:]
        folder = Path(next(word for word in words if word.startswith("--run_dir=")).partition("=")[2])
        folder.mkdir(parents=True)
        record, items = (json.loads((recorded / "mine/first" / n).read_text()) for n in ("record.json", "items.json"))
        state.change(record, items)
        (folder / "record.json").write_text(json.dumps(record))
        (folder / "items.json").write_text(json.dumps(items))
        return SimpleNamespace(returncode=state.code)

    monkeypatch.setattr(reproduce.subprocess, "run", start)
    return state


def test_a_real_run_comes_out_bit_for_bit(recorded, astbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = astbench("reproduce", "mine/first", f"--results={recorded}")
    assert done.code == 0, done.err
    assert "# mine/first\nastbench fit " in done.out and "f1 0: the same" in done.out
    assert done.out.splitlines()[-1] == "  REPRODUCED bit for bit"
    assert (tmp_path / "runs/reproduced/mine/first/record.json").exists()
    again = astbench("reproduce", "mine", "1", f"--results={recorded}", "--run_dir=runs/reproduced/mine/first")
    assert again.code == 2 and "is there already; name another" in again.err


def test_printing_runs_nothing(recorded, ran, astbench):
    done = astbench("reproduce", "mine", "1", f"--results={recorded}", "--print")
    assert done.code == 0 and ran.words is None
    assert "astbench fit --attention=ast --task=triviaqa" in done.out


def test_options_are_laid_over(recorded, ran, astbench):
    done = astbench("reproduce", "mine/first", f"--results={recorded}", "--data.stride=32", "--run_dir=here")
    assert done.code == 0, done.err
    assert [word for word in ran.words if "stride" in word] == ["--data.stride=32"]
    assert ran.words[-1] == "--run_dir=here"
    astbench("reproduce", "mine/first", f"--results={recorded}", "--seed=3", "--backbone=x", "--run_dir=there")
    named = [word for word in ran.words if word.startswith(("--seed", "--backbone"))]
    assert named == ["--seed=3", "--backbone=x"]


def test_a_run_that_evaluates_names_its_checkpoint(recorded, ran, astbench, tmp_path):
    results = shutil.copytree(recorded, tmp_path / "results")
    file = results / "mine/first/record.json"
    record = json.loads(file.read_text()) | {"command": "validate", "checkpoint": "runs/gone/last.ckpt"}
    file.write_text(json.dumps(record))
    words = ["reproduce", "mine/first", f"--results={results}"]
    done = astbench(*words)
    assert done.code == 2 and "evaluates runs/gone/last.ckpt, which is not here" in done.err and ran.words is None
    assert "--ckpt_path=runs/gone/last.ckpt" in astbench(*words, "--print").out
    here = astbench(*words, f"--ckpt_path={tmp_path}")
    assert here.code == 0 and f"--ckpt_path={tmp_path}" in ran.words, here.err


@pytest.mark.parametrize(
    "change, code, message",
    [
        (lambda record, items: record["metrics"].update(f1=1.0), 1, "f1 0 on record, 1 now: OUTSIDE 0 to 0"),
        (lambda record, items: record["metrics"].pop("em"), 1, "em 0 is missing now"),
        (lambda record, items: record["config"]["attention"].update(density=0.5), 1, "--attention.density 0.25 on"),
        (lambda record, items: record["config"]["data"].update(num_workers=1), 0, "REPRODUCED bit for bit"),
        (lambda record, items: record["versions"].update(torch="9.9"), 0, "torch 2."),
        (
            lambda record, items: record["data"]["fingerprints"].update(validation="0" * 16),
            1,
            "other examples: validation",
        ),
        (lambda record, items: next(iter(items.values())).update(prediction="x"), 0, "REPRODUCED within its interval"),
    ],
)
def test_what_came_is_held_against_the_record(recorded, ran, astbench, change, code, message):
    ran.change = change
    done = astbench("reproduce", "mine/first", f"--results={recorded}")
    assert done.code == code and message in done.out, done.out + done.err
    assert ("NOT REPRODUCED" in done.out) == (code == 1)


def test_a_command_that_fails_is_no_verdict(recorded, ran, astbench):
    ran.code = 3
    done = astbench("reproduce", "mine/first", f"--results={recorded}")
    assert (
        done.code == 3 and "the command ended with 3; nothing to compare" in done.err and "REPRODUCED" not in done.out
    )


def test_a_folder_of_another_machine_must_be_named(recorded, ran, astbench, tmp_path):
    results = shutil.copytree(recorded, tmp_path / "results")
    file = results / "mine/first/record.json"
    record = json.loads(file.read_text())
    record["config"]["data"]["path"] = "/somebody/data"
    record["config_hash"] = config_hash(record["config"])
    file.write_text(json.dumps(record))
    done = astbench("reproduce", "mine/first", f"--results={results}")
    assert done.code == 2 and "name yours with --data.path=FOLDER" in done.err and ran.words is None
    assert astbench("reproduce", "mine/first", f"--results={results}", "--data.path=x").code == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["demo"], "takes TABLE ROW, such as `demo 2`, or TABLE/RUN"),
        (["demo", "99"], "demo has rows 1 to"),
        (["demo", "0"], "demo has rows 1 to"),
        (["dmo", "1"], "unknown table 'dmo' (did you mean demo?)"),
        (["demo/astt"], "demo has no run 'astt'"),
        (["x/y"], "unknown table 'x'"),
        (["demo", "1", "--data.path"], "is neither a row nor an option"),
        (["cost", "1"], "measures times, which belong to a machine"),
        (["triviaqa/minilm-ast"], "starts from the run runs/squad-dense, which is not here"),
    ],
)
def test_refusals(astbench, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    done = astbench("reproduce", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def changed(run, seed, **metrics):
    record = copy.deepcopy(run.record)
    record["seed"] = seed
    record["metrics"] |= metrics
    return type(run)(run.group, f"seed{seed}", run.folder, record, run.entry)


def test_seeds_make_the_interval_where_there_are_several(recorded):
    """By hand: 40, 50, 60 have mean 50, deviation 10; t(0.975, 2) = 4.3027, so one more lies within 50 +- 49.68."""
    run = read_groups(recorded)["mine"].runs[0]
    seeds = [changed(run, seed, f1=value) for seed, value in enumerate((40.0, 50.0, 60.0))]
    for value, holds in ((99.6, True), (99.8, False), (0.4, True), (0.2, False)):
        record = changed(run, 0, f1=value).record
        found = verdict(seeds[0], seeds, record, run.items())
        score = next(score for score in found.scores if score.name == "f1")
        assert (score.low, score.high) == (pytest.approx(50 - 49.683, abs=1e-2), pytest.approx(50 + 49.683, abs=1e-2))
        assert score.inside == holds and found.holds == holds and "further seed, from 3" in score.of


@pytest.mark.parametrize("name", ["ablations/both-seed0", "density/ast-density0.25-seed1", "wikitext2-scratch/dense-0"])
def test_the_seeds_of_a_real_record_are_found(name):
    book = Book(ROOT / "results", ROOT / "docs", ROOT / "recipes")
    group, _, run = name.partition("/")
    found = reproduce._seeds(book, next(one for one in book.groups[group].runs if one.name == run))
    assert sorted(one.record["seed"] for one in found) == [0, 1, 2]


def test_perplexity_lies_within_the_interval_of_its_windows():
    groups = read_groups(ROOT / "results")
    run = next(run for run in groups["smollm2-4k"].runs if run.name == "dense")
    near, far = ({**run.metrics, "perplexity": run.metrics["perplexity"] * factor} for factor in (1.01, 2.0))
    for metrics, holds in ((near, True), (far, False)):
        found = verdict(run, [run], {**run.record, "metrics": metrics}, run.items())
        score = next(score for score in found.scores if score.name == "perplexity")
        assert score.low < run.metrics["perplexity"] < score.high and score.inside == holds and not found.exact
    same = verdict(run, [run], run.record, run.items())
    assert same.exact and same.holds and same.lines()[-1] == "REPRODUCED bit for bit"
