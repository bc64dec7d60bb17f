"""A sweep that runs: once each, and gone on with after whatever stopped it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from astbench.cli.stopping import SIGNALS
from astbench.errors import ConfigError, Terminated
from astbench.sweeps import local
from astbench.sweeps.estimates import estimate, known_runs
from astbench.sweeps.journal import JOURNAL, alone
from astbench.sweeps.run import run
from astbench.sweeps.spec import expand, read_sweep
from astbench.sweeps.states import look, wanted
from tests.astbench.cli.commands import SMALL, command

ROOT = Path(__file__).parents[3]
STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
AXES = "options: {{task: triviaqa, attention: dense}}\naxes: {{optim.lr: {rates}, seed: {seeds}}}\n"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "CHILD", STAND_IN)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(rates, seeds="[0]"):
        Path("s.yaml").write_text(AXES.format(rates=rates, seeds=seeds))
        return read_sweep(Path("s.yaml"))

    return write


def start(sweep, jobs=1, retry=False):
    return run(sweep, jobs=jobs, retry=retry, plugins=(), results=Path("results"))


def journal(sweep):
    return json.loads((sweep.folder / JOURNAL).read_text())["cells"]


def begun(sweep):
    """How often each cell was begun."""
    return Counter(line.split()[0] for line in (sweep.folder / "begun.txt").read_text().splitlines())


def test_each_cell_runs_once(sweep, capsys):
    found = sweep("[0.1]", "[0, 1, 2]")
    assert start(found, jobs=2) == 0
    assert begun(found) == {f"lr0.1-seed{seed}": 1 for seed in range(3)}
    assert {entry["state"] for entry in journal(found).values()} == {"done"}
    said = capsys.readouterr().out
    assert "3 cells in runs/s, 3 to run, 2 at a time" in said and "[3/3] lr0.1-seed" in said and "f1 0.5" in said
    assert "3 of 3 cells done" in said
    assert start(found) == 0
    assert sum(begun(found).values()) == 3 and "nothing to run" in capsys.readouterr().out


def test_cores_are_shared_out(sweep, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = sweep("[0.1]")
    start(found, jobs=4)
    assert (found.folder / "begun.txt").read_text().split()[1] == "2"


def test_failures_are_kept_with_their_reason_and_tried_again_when_asked(sweep, capsys):
    found = sweep("[0.2, 0.3, 0.5, 0.1]")
    assert start(found) == 1
    entries = journal(found)
    assert [entries[f"lr{rate}-seed0"]["state"] for rate in (0.2, 0.3, 0.5, 0.1)] == ["failed"] * 3 + ["done"]
    assert entries["lr0.2-seed0"]["error"] == "it cannot be" and entries["lr0.3-seed0"]["exit_code"] == 2
    assert "killed by signal 9" in entries["lr0.5-seed0"]["error"]
    said = capsys.readouterr().out
    assert "1 of 4 cells done" in said and "lr0.3-seed0: failed: --optim.lr is refused" in said and "--retry" in said
    start(found)
    assert begun(found) == {"lr0.2-seed0": 1, "lr0.5-seed0": 1, "lr0.1-seed0": 1}, "nothing failed is tried by itself"
    assert "lr0.3-seed0  failed     --optim.lr is refused" in capsys.readouterr().out
    start(found, retry=True)
    assert begun(found) == {"lr0.2-seed0": 2, "lr0.5-seed0": 2, "lr0.1-seed0": 1}
    kept = json.loads((found.folder / "failed" / "lr0.2-seed0-1" / "record.json").read_text())
    assert kept["state"] == "failed"


def forked(function):
    """A process of its own that has the imports behind it."""
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(0)
    return process


def wait_for(file):
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


BECOMES = (
    "import sys; from astbench.sweeps import child; "
    f"child.COMMAND = (sys.executable, {STAND_IN[1]!r}, '0'); child.main()"
)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_goes_on(sweep, how, monkeypatch):
    """`kill -9` too: the system tells the cell that its sweep is gone, and the next sweep waits for it."""
    monkeypatch.setattr(local, "CHILD", (sys.executable, "-c", BECOMES))
    found = sweep("[0.1, 0.4]", "[0, 1]")

    def body():
        with SIGNALS.listening():
            try:
                start(found)
            except Terminated:
                (found.folder / "told").touch()

    process = forked(body)
    cell = found.folder / "lr0.4-seed0"
    wait_for(cell / "ready")
    os.kill(process, how)
    os.waitpid(process, 0)
    assert (found.folder / "told").exists() == (how == signal.SIGTERM)
    assert journal(found)["lr0.4-seed0"]["state"] == ("stopped" if how == signal.SIGTERM else "running")
    goes_on = forked(lambda: start(found))
    wait_for(found.folder / "lr0.4-seed1" / "ready")
    assert begun(found) == {"lr0.1-seed0": 1, "lr0.1-seed1": 1, "lr0.4-seed0": 2, "lr0.4-seed1": 1}
    record = json.loads((cell / "record.json").read_text())
    assert record["state"] == "done" and record["resumed"][0]["argv"] == ["fit", f"--resume={cell}"]
    os.kill(goes_on, signal.SIGTERM)
    os.waitpid(goes_on, 0)


def test_one_sweep_a_folder(sweep):
    found = sweep("[0.1]")
    with alone(found.folder), pytest.raises(ConfigError, match="another sweep runs in runs/s"):
        start(found)


def test_another_run_in_a_cells_folder_is_left_alone(sweep):
    found = sweep("[0.1]")
    start(found)
    (cell,), _ = expand(found)
    os.rename(cell.folder, "kept")
    other = sweep("[0.2]")
    (mine,), _ = expand(other)
    os.rename("kept", mine.folder)
    with pytest.raises(ConfigError, match=r"lr0.2-seed0 holds another run: --optim.lr is 0.1 there and 0.2 here"):
        start(other)
    assert (mine.folder / "done.json").exists()


def test_files_of_others_are_left_alone(sweep):
    found = sweep("[0.1]")
    (cell,), _ = expand(found)
    cell.folder.mkdir(parents=True)
    (cell.folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds files and no run"):
        start(found)
    assert (cell.folder / "thesis.tex").exists()


def test_a_run_killed_before_its_first_checkpoint_is_repeated(sweep):
    found = sweep("[0.5]")
    start(found)
    (cell,), _ = expand(found)
    assert look(cell).state == "to repeat"
    start(found, retry=True)
    assert begun(found) == {"lr0.5-seed0": 2}


def test_a_folder_that_cannot_be_is_named(sweep):
    found = sweep("[0.1]")
    Path("runs").mkdir()
    (Path("runs") / "s").write_text("a file")
    with pytest.raises(ConfigError, match="folder: runs/s cannot be written"):
        start(found)


def test_a_sweep_does_not_run_in_a_runs_folder(sweep):
    found = sweep("[0.1]")
    start(found)
    inside = found.folder / "lr0.1-seed0"
    Path("s.yaml").write_text(AXES.format(rates="[0.1]", seeds="[0]") + f"folder: {inside}\n")
    with pytest.raises(ConfigError, match="is the folder of a run"):
        start(read_sweep(Path("s.yaml")))


def test_the_table_needs_nothing_written_by_hand(sweep):
    found = sweep("[0.1]")
    start(found)
    assert (found.folder / "table.yaml").read_text() == 'kind: sweep\ntitle: "s"\n'
    (found.folder / "table.yaml").write_text("kind: sweep\ntitle: Mine\n")
    start(found)
    assert "Mine" in (found.folder / "table.yaml").read_text()


def test_options_of_an_evaluation_are_those_of_its_run(sweep, tmp_path):
    """As the command line takes them: first the run's config, then the sweep's, then what is said."""
    run_ = tmp_path / "trained"
    run_.mkdir()
    (run_ / "config.yaml").write_text(
        "attention: {name: ast, top_k: 3}\ntask: {name: triviaqa}\ndata: {max_length: 128, stride: 31}\n"
    )
    Path("s.yaml").write_text(f"command: validate\noptions: {{ckpt_path: {run_}}}\naxes: {{data.stride: [32]}}\n")
    (cell,), _ = expand(read_sweep(Path("s.yaml")))
    found = wanted(cell)
    told = [found[key] for key in ("attention.name", "attention.top_k", "data.max_length", "data.stride")]
    assert told == ["ast", 3, 128, 32]


def test_an_estimate_grows_with_steps_and_tokens(sweep):
    found = sweep("[0.1]")
    start(found)
    (cell,), _ = expand(found)
    (known,) = known_runs([found.folder])
    assert (known.seconds, known.training, known.steps) == (7.0, 6.0, 3)
    options = {**known.options, "trainer.max_steps": 3, "data.max_length": 128, "data.batch_size": 4}
    known = replace(known, options=options)

    def seconds(**more):
        asked = {key.replace("__", "."): value for key, value in more.items()}
        return estimate(replace(cell, options={**cell.options, **asked}), [known])

    same = seconds(trainer__max_steps=3, data__max_length=128, data__batch_size=4)
    assert same.seconds == 17.0 and same.memory == 10**9
    assert seconds(trainer__max_steps=6, data__max_length=128, data__batch_size=4).seconds == 10 + 1 + 12
    twice = seconds(trainer__max_steps=3, data__max_length=256, data__batch_size=4)
    assert twice.seconds == 24.0 and twice.memory == 2 * 10**9
    assert estimate(cell, []) is None


def test_an_estimate_is_after_the_same_model_rather_than_the_same_attention(sweep):
    found = sweep("[0.1]")
    start(found)
    (cell,), _ = expand(found)
    (known,) = known_runs([found.folder])
    asked = wanted(cell)
    large = replace(known, name="large", options={**asked, "backbone.name": "bert-mini"})
    other = replace(known, name="other", options={**asked, "attention.name": "linear", "optim.lr": 1, "data.stride": 7})
    assert estimate(cell, [large, other]).after == "other"
    assert estimate(cell, [large]).after == "large"
    assert estimate(cell, [large, other, replace(known, name="same", options=asked)]).after == "same"


def test_a_damaged_journal_is_told(sweep):
    found = sweep("[0.1]")
    start(found)
    (found.folder / JOURNAL).write_text("{")
    with pytest.raises(ConfigError, match=r"sweep.json cannot be read: .*remove it"):
        start(found)


def test_options_are_those_of_the_command_line(sweep, tmp_path):
    Path("c.yaml").write_text(
        "attention: {name: ast, top_k: 2}\noptim: {lr: 0.5, warmup_steps: 4}\ndata: {stride: 31}\n"
    )
    Path("s.yaml").write_text(
        "config: c.yaml\noptions: {task: triviaqa}\naxes: {attention: [ast, dense], optim.lr: [1e-4]}"
    )
    ast, dense = expand(read_sweep(Path("s.yaml")))[0]
    assert wanted(ast)["attention.top_k"] == 2 and "attention.top_k" not in wanted(dense)
    for cell in (ast, dense):
        found = wanted(cell)
        assert (found["optim.lr"], found["optim.warmup_steps"], found["data.stride"]) == ("1e-4", 4, 31)


@pytest.mark.parametrize(
    "text, code, message",
    [
        ("options: {task: triviaqa}\naxes: {seed: [0]}", 2, "the sweep names no attention"),
        ("options: {task: triviaqa, attention: dnse}\naxes: {seed: [0]}", 4, "dnse"),
        ("options: {task: trivia, attention: dense}\naxes: {seed: [0]}", 4, "trivia"),
        ("options: {task: triviaqa, attention: dense, seeed: 1}\naxes: {seed: [0]}", 2, "no option --seeed"),
        ("command: bench\noptions: {atention: dense}\naxes: {seed: [0]}", 2, "no option --atention"),
        ("options: {task: triviaqa, attention: dense, optim.rl: 1}\naxes: {seed: [0]}", 2, "no option --optim.rl"),
        (
            "options: {task: triviaqa, attention: ast, attention.density: 7}\naxes: {seed: [0]}",
            2,
            "density must be above",
        ),
        (
            "options: {task: triviaqa, attention: ast, attention.density: lots}\naxes: {seed: [0]}",
            2,
            "attention.density",
        ),
        ("options: {task: triviaqa, attention: dense}\naxes: {seed: [abc]}", 2, "must be a whole number, got 'abc'"),
        ("options: {task: triviaqa, attention: dense}\naxes: {seed: [-1]}", 2, "must be 0 or more, got -1"),
        (
            "options: {task: triviaqa, attention: dense, optim.lr: high}\naxes: {seed: [0]}",
            2,
            "--optim.lr must be a num",
        ),
        (
            "options: {task: triviaqa, attention: dense, trainer.max_steps: many}\naxes: {seed: [0]}",
            2,
            "max_steps must be",
        ),
        ("config: none.yaml\noptions: {task: triviaqa, attention: dense}\naxes: {seed: [0]}", 2, "--config=none.yaml"),
    ],
)
def test_a_sweep_that_cannot_run_ends_before_it_begins(sweep, astbench, text, code, message):
    Path("s.yaml").write_text(text)
    done = astbench("run", "s.yaml")
    assert done.code == code and message in done.err and done.err.count("\n") == 1
    assert not list(Path("runs").rglob("record.json"))


def test_on_the_command_line(astbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "usage: astbench run SWEEP.yaml" in astbench("run", "--help").out
    for words, message in (
        ([], "the following arguments are required: SWEEP.yaml"),
        (["none.yaml"], "none.yaml does not exist"),
        (["s.yaml", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["s.yaml", "--job=1"], "unrecognized arguments: --job=1"),
    ):
        done = astbench("run", *words)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_a_real_fit_is_found_done(astbench, tmp_path, monkeypatch):
    """What the command line makes of a cell's words is what the sweep expects of its record."""
    monkeypatch.chdir(tmp_path)
    options = dict(word[2:].split("=") for word in SMALL)
    lines = "".join(f"  {key}: {value}\n" for key, value in options.items())
    axes = "axes: {attention: [ast], attention.density: [0.5], optim.lr: [1e-3], seed: [3]}\n"
    Path("s.yaml").write_text(f"options:\n  task: triviaqa\n{lines}{axes}")
    sweep = read_sweep(Path("s.yaml"))
    (cell,), _ = expand(sweep)
    assert look(cell).state == "to run"
    done = astbench(*cell.words())
    assert done.code == 0, done.err
    assert look(cell).state == "done"
    planned = astbench("run", "s.yaml", "--plan")
    assert planned.code == 0 and "1 cell in runs/s, 0 to run" in planned.out
    Path("s.yaml").write_text(f"options:\n  task: triviaqa\n{lines}{axes.replace('0.5', '0.25')}")
    assert "to run" in astbench("run", "s.yaml", "--plan").out


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_that_ship_can_run(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    for profile in ("quick", "full"):
        sweep = read_sweep(file, profile)
        cells, _ = expand(sweep)
        assert all(wanted(cell) for cell in cells)
        if sweep.command != "fit":  # nothing is drawn where nothing is trained
            continue
        seeds = {cell.options["seed"] for cell in cells}
        assert len(seeds) >= 3 and len(cells) % len(seeds) == 0


@pytest.mark.slow
def test_a_real_sweep_killed_and_gone_on_with(tmp_path):
    options = dict(word[2:].split("=") for word in SMALL) | {"trainer.max_steps": 60, "checkpoint_every": 1}
    lines = "".join(f"  {key}: {value}\n" for key, value in options.items())
    (tmp_path / "s.yaml").write_text(f"options:\n  task: triviaqa\n{lines}axes: {{attention: [dense, ast]}}\n")
    words = [sys.executable, "-m", "astbench", "run", "s.yaml"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "runs/s/dense/previous.ckpt")
        process.kill()
    done = command("run", "s.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("dense", "ast"):
        record = json.loads((tmp_path / "runs/s" / name / "record.json").read_text())
        assert record["state"] == "done" and record["train"]["steps"] == 60
        assert len(record.get("resumed", [])) == (name == "dense")
