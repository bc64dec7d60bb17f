"""Full disks, no memory, closed streams, odd environments and plugins: one line that says so, and its code."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from astbench.bench import layers
from astbench.bench.config import BenchConfig
from astbench.errors import SystemRefusal, refused_by_system
from astbench.runs.folder import CONFIG, DONE, RECORD
from astbench_registry import registry
from tests.astbench.cli.commands import FIT, SMALL, command
from tests.astbench.cli.test_cli import assert_refused
from tests.astbench.conftest import NAMES, PLUGIN


@contextmanager
def files_of_at_most(size):
    """As on a disk that is full behind so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_called_that(astbench, tmp_path):
    with files_of_at_most(300_000):
        outcome = astbench(*FIT, f"--run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 7, "could not be written: File too large")
    assert json.loads((tmp_path / "run" / RECORD).read_text())["state"] == "failed"


def test_a_disk_that_is_full_at_the_tokenizer_is_called_that(astbench, tmp_path):
    with files_of_at_most(10_000):
        outcome = astbench(*FIT, f"--run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 7, "files may not be that large here")


def test_no_memory_is_called_that(astbench, tmp_path, plugin_file):
    code = PLUGIN.replace("NAME", "mine").replace(
        "        q, k, v = mask", "        q.new_empty(2**50)\n        q, k, v = mask"
    )
    plugin = plugin_file(code=code)
    outcome = astbench("fit", f"--attention={plugin}:Mine", NAMES[1], *SMALL, f"--run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 7, "out of memory on the CPU; lower --data.batch_size")
    assert json.loads((tmp_path / "run" / RECORD).read_text())["state"] == "out_of_memory"


def test_a_folder_that_is_deleted_is_called_that(astbench, tmp_path, plugin_file):
    folder = tmp_path / "run"
    remove = f"        if self.training: __import__('shutil').rmtree({str(folder)!r}, ignore_errors=True)\n"
    code = PLUGIN.replace("NAME", "mine").replace("        q, k, v = mask", remove + "        q, k, v = mask")
    words = ["fit", f"--attention={plugin_file(code=code)}:Mine", NAMES[1], *SMALL, f"--run_dir={folder}"]
    outcome = astbench(*words)
    assert_refused(outcome, 7, str(folder))
    assert "is gone" in outcome.err or "No such file" in outcome.err


def test_no_threads_are_called_that():
    refused = refused_by_system(RuntimeError("can't start new thread"))
    assert isinstance(refused, SystemRefusal) and "ulimit -u" in str(refused)


def test_strays_in_the_environment_hide_no_error():
    for stray in ({"LOCAL_RANK": "1"}, {"SLURM_NTASKS": "2"}):
        done = command("fit", "--attention=nope", "--task=triviaqa", env={**os.environ, **stray})
        assert done.returncode == 4 and done.stderr.startswith("astbench: error: unknown attention 'nope'")


@pytest.mark.slow
@pytest.mark.parametrize("stray", [{"LOCAL_RANK": "1"}, {"SLURM_NTASKS": "2"}])
def test_a_run_heeds_no_strays(tmp_path, stray):
    done = command(*FIT, f"--run_dir={tmp_path / 'run'}", env={**os.environ, **stray})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / DONE).exists() and (tmp_path / "run/metrics.csv").exists()


def test_without_docstrings():
    for words in (["list"], ["describe", "ast"], ["--help"]):
        done = command(*words, env={**os.environ, "PYTHONOPTIMIZE": "2"})
        assert done.returncode == 0 and not done.stderr, done.stderr
    done = command(*FIT, env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert done.returncode == 7 and done.stderr.count("\n") == 1 and "PYTHONOPTIMIZE=1" in done.stderr


def test_without_standard_streams(tmp_path):
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        line = f'exec "$PY" -m astbench describe ast {closed}'
        done = subprocess.run(["bash", "-c", line], env={**os.environ, "PY": sys.executable}, capture_output=True)
        assert done.returncode == 0, (closed, done.stderr)


def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "astbench", "describe", "ast"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 7 and done.stderr.count("\n") == 1 and "the disk is full" in done.stderr


def test_an_argument_that_is_no_text_is_refused(astbench):
    assert_refused(astbench(*FIT, "--run_dir=a\udcff"), 2, "not valid UTF-8")


LONG = "r" * 400


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([*FIT, f"--run_dir={LONG}"], 2),
        ([*FIT, f"--config={LONG}"], 2),
        ([*FIT, f"--backbone=/{LONG}"], 2),
        ([*FIT, f"--init_from={LONG}"], 6),
        (["validate", f"--ckpt_path={LONG}"], 6),
        (["fit", f"--resume={LONG}"], 6),
        (["fit", *NAMES, "--data.source=local", f"--data.path={LONG}"], 3),
    ],
)
def test_a_typed_name_that_the_system_refuses(astbench, tmp_path, monkeypatch, words, code):
    monkeypatch.chdir(tmp_path)
    assert_refused(astbench(*words), code)
    assert not list(tmp_path.iterdir())


def test_a_callback_with_an_enum_among_its_defaults(astbench, tmp_path):
    (tmp_path / "c.yaml").write_text("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timer}]}\n")
    words = [*FIT, "--trainer.max_steps=1", f"--config={tmp_path / 'c.yaml'}"]
    outcome = astbench(*words, f"--run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    again = astbench("fit", f"--config={tmp_path / 'run' / CONFIG}", f"--run_dir={tmp_path / 'again'}")
    assert again.code == 0, again.err


RAISING = "class Odd(BaseException): pass\n"


def test_whatever_a_plugin_raises_is_one_line(astbench, tmp_path, plugin_file):
    plugin = plugin_file(file="odd.py", code=RAISING + "raise Odd('boo')\n")
    assert_refused(astbench("list", f"--plugins={plugin}"), 4, "odd.py does not load: Odd: boo")
    for number, end in enumerate(("raise Odd('boo')", "raise SystemExit(0)")):
        code = RAISING + PLUGIN.replace("NAME", f"mine{number}").replace(
            "        q, k, v = mask", f"        {end}\n        q, k, v = mask"
        )
        file = plugin_file(file=f"odd{number}.py", code=code)
        folder = tmp_path / f"run{number}"
        outcome = astbench("fit", f"--attention={file}:Mine", NAMES[1], *SMALL, f"--run_dir={folder}")
        assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome.err


@pytest.mark.parametrize("name", ["a\0.txt", "a" * 5000, "\ud800", "loop"])
def test_evidence_of_an_impossible_name_is_a_data_error(astbench, tmp_path, name):
    evidence = tmp_path / "evidence/wikipedia"
    evidence.mkdir(parents=True)
    os.symlink("loop", evidence / "loop")
    page = {"Filename": name, "Title": "t"}
    item = {"QuestionId": "q", "Question": "who?", "Answer": {"Value": "Bob", "Aliases": []}, "EntityPages": [page]}
    for split in ("train", "dev"):
        (tmp_path / f"wikipedia-{split}.json").write_text(json.dumps({"Data": [item]}))
    words = ["--data.source=local", f"--data.path={tmp_path}", f"--run_dir={tmp_path / 'run'}"]
    outcome = astbench("fit", "--attention=local", "--task=triviaqa", *words)
    assert outcome.code == 3 and len(outcome.err) < 1000, outcome.err


def test_a_broken_package_is_in_nobodys_way(astbench, tmp_path, monkeypatch):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[astbench.attention]\nbroken = broken_module:Broken\n")
    (tmp_path / "broken_module.py").write_text(RAISING + "raise Odd('boo')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for attribute in ("builtin", "table"):
        rows = getattr(registry._names, attribute)
        monkeypatch.setattr(registry._names, attribute, {name: rows[name] for name in ("dense", "local")})
    done = astbench("check", "--all")
    assert done.code == 0, done.err
    assert "broken left out: attention 'broken' from broken" in done.out and "\nlocal: " in done.out
    assert_refused(astbench("check", "broken"), 4, "does not load: Odd: boo")
    said = []
    found = layers.chosen(BenchConfig(attention="all", lengths=[32]), said.append)
    assert [entry.name for entry in found] == ["dense", "local"]
    assert any("broken left out: " in line for line in said)
