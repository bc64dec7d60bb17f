"""Options, output and runs that could get lost: files that are read once, signals, readers that go away."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from astbench.cli.config_files import read_config
from astbench.runs.folder import CONFIG, DONE, LOCK, PREVIOUS, RECORD
from tests.astbench.cli.commands import FIT
from tests.astbench.cli.test_cli import assert_refused
from tests.astbench.conftest import NAMES, PLUGIN


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2\n",
        "optim: {lr: 0.1}\noptim: {warmup_steps: 1}\n",
        "optim: {lr: 0.1, lr: 0.2}\n",
        "model: {attention: {name: dense}}\n",
    ],
)
def test_a_config_that_says_a_thing_twice_is_refused(astbench, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    outcome = astbench(*FIT, f"--config={tmp_path / 'c.yaml'}", f"--run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 2, "c.yaml")


def test_what_a_merge_takes_in_may_be_said_again(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "optim: &a {lr: 1, beta1: 0.5}\ndata: &b {<<: *a, lr: 2}\ntrainer: {<<: *b, lr: 3}\n"
    )
    assert read_config(str(tmp_path / "c.yaml")).data["trainer"] == {"lr": 3, "beta1": 0.5}


def pipe(text):
    """A path that gives a text once, as `<(cat file)` does."""
    out, into = os.pipe()
    os.write(into, text.encode())
    os.close(into)
    return f"/dev/fd/{out}"


def test_a_config_from_a_pipe_is_read_once(astbench, capsys):
    words = [*NAMES, f"--config={pipe('optim: {lr: 0.07}')}", f"--data={pipe('stride: 31')}"]
    with pytest.raises(SystemExit):
        astbench("fit", *words, "--print_config")
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["optim"]["lr"] == 0.07 and found["data"]["stride"] == 31
    several = [f"--config={pipe('optim: {lr: 0.07}')}", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    assert_refused(astbench("fit", *NAMES, *several), 2, "/dev/fd/", "write it to a file")


def wait_for(file, process):
    """Until a file is there."""
    end = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def begin(*words):
    """A command in a process group of its own."""
    words = [sys.executable, "-m", "astbench", *map(str, words)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, start_new_session=True, **streams)


def test_sigterm_to_the_group_saves_and_exits_143(tmp_path):
    folder = tmp_path / "run"
    words = ["--trainer.max_steps=4000", "--checkpoint_every=1", "--data.num_workers=2", f"--run_dir={folder}"]
    with begin(*FIT, *words) as process:
        wait_for(folder / PREVIOUS, process)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert said.count("astbench: error: ") == 1 and "terminated by SIGTERM at step" in said
    record = json.loads((folder / RECORD).read_text())
    assert record["state"] == "terminated" and record["train"]["steps"] > 0


@pytest.mark.parametrize("seconds", [0.6, 2.0, pytest.param(4.0, marks=pytest.mark.slow)])
def test_a_signal_in_the_first_seconds_is_heard(tmp_path, seconds):
    with begin(*FIT, "--trainer.max_steps=4000", f"--run_dir={tmp_path / 'run'}") as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 143 or (process.returncode == -signal.SIGTERM and seconds < 1), said
    assert "Traceback" not in said


SWALLOWING = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass
"""


def test_a_signal_that_a_library_swallows_is_heard(astbench, tmp_path, plugin_file):
    plugin = plugin_file(code=SWALLOWING + PLUGIN.replace("NAME", "mine"))
    outcome = astbench(*FIT, f"--plugins={plugin}", f"--run_dir={tmp_path / 'run'}")
    assert outcome.code == 143 and outcome.err == "astbench: error: terminated by SIGTERM\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_run_goes_on_without_a_reader(astbench, tmp_path, monkeypatch, reader):
    folder = tmp_path / "run"
    out, into = os.pipe()
    os.close(out)
    with os.fdopen(into, "w") as gone, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", gone if reader == "gone" else full)
        outcome = astbench(*FIT, f"--run_dir={folder}")
    assert outcome.code == 0 and (folder / DONE).exists()
    assert outcome.err.count("\n") == 1 and "standard output cannot be written" in outcome.err


@pytest.mark.slow
def test_runs_begun_in_the_same_second_get_folders_of_their_own(tmp_path):
    words = [sys.executable, "-m", "astbench", *FIT, "--trainer.max_steps=1"]
    several = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait(300) for process in several] == [0] * 4  # none has streams that would stay open
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_a_folder_of_a_run_killed_at_its_start_can_be_used(astbench, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK).touch()
    (folder / f".{CONFIG}.abc.tmp").touch()
    assert_refused(astbench("fit", f"--resume={folder}"), 6, f"--run_dir={folder}")
    assert astbench(*FIT, "--trainer.max_steps=1", f"--run_dir={folder}").code == 0
