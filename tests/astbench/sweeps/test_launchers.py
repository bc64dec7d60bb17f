"""Cells that others run: submitit's jobs, as processes of this machine, and tasks of a local Ray cluster."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from astbench.errors import ConfigError
from astbench.sweeps import launcher, local, remote
from astbench.sweeps.remote import Errand
from astbench.sweeps.run import run
from astbench.sweeps.spec import expand, read_sweep
from astbench.sweeps.states import look
from tests.astbench.sweeps.test_run import AXES, BECOMES, begun, forked, journal, sweep, wait_for  # noqa: F401

LOCAL = "slurm: {cluster: local, timeout_min: 2}\n"
RAY = "ray: {object_store_memory: 80000000}\n"
BECOMING = (sys.executable, "-c", BECOMES)


@pytest.fixture
def asked(sweep, monkeypatch):  # noqa: F811
    """A sweep whose file says what launchers are given; cells end with what started them."""
    monkeypatch.setattr(local, "CHILD", BECOMING)

    def write(rates, seeds="[0]", more=LOCAL):
        sweep(rates, seeds)
        Path("s.yaml").write_text(AXES.format(rates=rates, seeds=seeds) + more)
        return read_sweep(Path("s.yaml"))

    return write


def start(found, launcher, jobs=2, retry=False):
    return run(found, jobs=jobs, retry=retry, plugins=(), results=Path("results"), launcher=launcher)


APART = """
import sys
from pathlib import Path
from astbench.cli.stopping import SIGNALS
from astbench.errors import Terminated
from astbench.sweeps import local
from astbench.sweeps.run import run
from astbench.sweeps.spec import read_sweep
local.CHILD = {child!r}
with SIGNALS.listening():
    try:
        found = read_sweep(Path("s.yaml"))
        sys.exit(run(found, jobs=2, retry=False, plugins=(), results=Path("results"), launcher={launcher!r}))
    except Terminated as error:
        sys.exit(error.exit_code)
"""


def apart(launcher):
    """The sweep of s.yaml in a process of its own: a fork of one that has used Ray would hang."""
    code = APART.format(child=BECOMING, launcher=launcher)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], env=env)


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")
EITHER = [pytest.param("slurm", LOCAL, id="submitit"), pytest.param("ray", RAY, id="ray", marks=needs_ray)]


@pytest.fixture
def without_ray_after():
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "more"), EITHER)
def test_each_cell_runs_once_and_failures_keep_their_reason(asked, name, more, without_ray_after, capsys):
    found = asked("[0.1, 0.2]", "[0, 1]", more)
    assert start(found, name) == 1
    assert begun(found) == {f"lr{rate}-seed{seed}": 1 for rate in (0.1, 0.2) for seed in (0, 1)}
    states = {cell: entry["state"] for cell, entry in journal(found).items()}
    assert states == {f"lr{rate}-seed{s}": "done" if rate == 0.1 else "failed" for rate in (0.1, 0.2) for s in (0, 1)}
    assert journal(found)["lr0.2-seed1"]["error"] == "it cannot be"
    assert "2 of 4 cells done" in capsys.readouterr().out
    assert start(found, name) == 1 and sum(begun(found).values()) == 4, "nothing is run a second time"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), EITHER)
def test_a_stopped_sweep_stops_its_cells_which_save(asked, name, more):
    found = asked("[0.4]", "[0, 1]", more)

    process = apart(name)
    for seed in (0, 1):
        wait_for(found.folder / f"lr0.4-seed{seed}" / "ready")
    process.terminate()
    assert process.wait(60) == 143
    cells, _ = expand(found)
    assert [look(cell).state for cell in cells] == ["to resume"] * 2
    assert {entry["state"] for entry in journal(found).values()} == {"stopped"}


def parent_of(cell):
    """The process that waits for the one that writes in a cell's folder."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            words = (status.parent / "cmdline").read_text().split("\0")
            if f"--run_dir={cell.folder}" in words:
                return int(status.read_text().split("PPid:")[1].split()[0])
        except OSError:
            continue
    raise AssertionError(f"nobody runs {cell.folder}")


@needs_ray
def test_a_cell_goes_on_after_its_ray_worker_was_killed(asked):
    found = asked("[0.1, 0.4]", "[0]", RAY)
    cells, _ = expand(found)
    process = apart("ray")
    wait_for(found.folder / "lr0.4-seed0" / "ready")
    os.kill(parent_of(cells[1]), signal.SIGKILL)
    assert process.wait(120) == 0
    assert [look(cell).state for cell in cells] == ["done", "done"]
    assert begun(found) == {"lr0.1-seed0": 1, "lr0.4-seed0": 2}
    record = json.loads((cells[1].folder / "record.json").read_text())
    assert record["resumed"][0]["argv"] == ["fit", f"--resume={cells[1].folder}"]


def test_an_errand_repeats_nothing_and_goes_on(asked, monkeypatch):
    found = asked("[0.1, 0.4]")
    (quick, waits), _ = expand(found)
    logs = Path("logs")
    logs.mkdir()
    errand = pickle.loads(pickle.dumps(Errand(quick, (), logs.absolute() / "a.log", Path.cwd())))
    found.folder.mkdir(parents=True)
    assert errand()[0] == 0 and errand()[0] == 0
    assert begun(found) == {"lr0.1-seed0": 1}
    worker = forked(lambda: Errand(waits, (), logs.absolute() / "b.log", Path.cwd())())
    wait_for(waits.folder / "ready")
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    monkeypatch.setattr(remote, "_LOOK", 0.01)
    assert Errand(waits, (), logs.absolute() / "b.log", Path.cwd())()[0] == 0
    assert begun(found)["lr0.4-seed0"] == 2 and look(waits).state == "done"


def test_a_job_whose_time_is_over_saves_and_is_queued_again(asked):
    submitit = pytest.importorskip("submitit")
    found = asked("[0.4]")
    (cell,), _ = expand(found)
    found.folder.mkdir(parents=True)
    errand = Errand(cell, (), Path("cell.log").absolute(), Path.cwd())
    errand._process = local.start(cell.words(), errand.log, dict(os.environ), errand.child)
    wait_for(cell.folder / "ready")
    again = errand.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and look(cell).state == "to resume"
    assert pickle.loads(pickle.dumps(again.function))()[0] == 0 and look(cell).state == "done"


def test_a_cell_that_does_not_stop_is_ended(asked, monkeypatch):
    monkeypatch.setattr(local, "PATIENCE", 0.3)
    assert launcher.PATIENCE >= 60
    deaf = (
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)\nwhile 1: time.sleep(1)",
    )
    process = local.start([], Path("deaf.log"), dict(os.environ), deaf)
    end = time.monotonic() + 30
    while not Path("deaf.log").read_text() and time.monotonic() < end:
        time.sleep(0.02)
    local.stop([process])
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("slurm", "", '--launcher=slurm: Could not detect "srun"'),
        ("slurm", "slurm: {cluster: local, nodez: 3}\n", "--launcher=slurm: .*nodez"),
        ("slurm", "slurm: [1]\n", "slurm must be a mapping of its options"),
        pytest.param("ray", "ray: {gpus: 1}\n", "--launcher=ray: .*gpus", marks=needs_ray),
        pytest.param("ray", "ray: {address: '127.0.0.1:9'}\n", "no cluster answers at 127.0.0.1:9", marks=needs_ray),
        pytest.param("ray", "ray: {address: '127.0.0.1:99999'}\n", "no cluster answers", marks=needs_ray),
    ],
)
def test_what_cannot_be_is_named(asked, name, more, said, monkeypatch, without_ray_after):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=said):
        start(asked("[0.1]", "[0]", more), name)


@pytest.mark.parametrize(("name", "module"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_extra_that_is_not_installed_is_named(asked, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"--launcher={name} needs {module}: pip install 'astbench\[{name}\]'"):
        start(asked("[0.1]"), name)
