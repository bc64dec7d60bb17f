"""A deployment test that runs: each cell once, whatever its server does, and no server left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from astbench.deploy import run as runner
from astbench.deploy import workload
from astbench.deploy.plan import plan
from astbench.deploy.recipe import read_recipe
from astbench.errors import ConfigError, DataError
from astbench.loadtest.client import Sent
from astbench.sweeps import local
from astbench.tables.records import read_group

pytest.importorskip("aiohttp", reason="the extra 'loadtest' is not installed")

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))


class Letters:
    """A tokenizer: a token a character."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode()), "offset_mapping": [(n, n + 1) for n in range(len(text))]}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Servers by name and window, which says what the stand-in does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "CHILD", STAND_IN)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "started.txt"))
    monkeypatch.setattr(workload, "load_tokenizer", lambda _: Letters())
    Path("t.txt").write_text("".join(chr(97 + n % 26) for n in range(300)))

    def made(windows, **changes):
        said = {
            "folder": "runs/d",
            "model": "m",
            "text": "t.txt",
            "servers": {name: {"attention": {"name": "local", "window": n}} for name, n in windows.items()},
            "load": [{"length": 32, "output": 4, "requests": 6}],
            "serve": {"max_batch": 2},
            "rates": {"per_second": [20, 40]},
            "slo": {"ttft": 0.2},
            **changes,
        }
        Path("r.yaml").write_text(yaml.safe_dump(said))
        return read_recipe(Path("r.yaml"))

    return made


def start(recipe, **options):
    return runner.run(recipe, ["r.yaml"], **options)


def servers():
    """Process and window of each server that was started."""
    file = Path("started.txt")
    return [tuple(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def states(recipe):
    return {one.cell.name: one.state for one in plan(recipe)}


def test_each_cell_is_measured_once_by_one_server(recipe, capsys):
    found = recipe({"a": 1, "b": 1}, rates={"of_capacity": [0.1, 0.2]}, slo={"ttft_times": 1000})
    assert start(found) == 0
    assert len(servers()) == 2 and all(gone(pid) for pid, _ in servers())
    assert set(states(found).values()) == {"done"} and len(states(found)) == 6
    records = {file.parent.name: json.loads(file.read_text()) for file in Path("runs/d").glob("*/record.json")}
    one, other = records["a-32-0.1x"], records["b-32-0.1x"]
    assert one["config"]["rate"] == other["config"]["rate"] and one["load"]["answered"] == 6
    assert one["served"]["attention"]["name"] == "local" and one["server"]["cpu_seconds"] is not None
    assert one["server"]["peak_resident_bytes"] > 1e6 and one["peak_memory"]["cpu_bytes"] > 1e6
    items = [json.loads(Path(f"runs/d/{name}/items.json").read_text())["load"] for name in ("a-32-0.1x", "b-32-0.1x")]
    assert [row["due"] for row in items[0].values()] == [row["due"] for row in items[1].values()]
    assert all(len(row["tokens"]) == 4 for row in items[0].values())
    assert {"curves.svg", "curves.png", "curves.csv", "table.yaml"} <= set(os.listdir("runs/d"))
    stamps = {file: file.stat().st_mtime_ns for file in Path("runs/d").glob("*/record.json")}
    capsys.readouterr()
    assert start(found) == 0
    assert len(servers()) == 2 and "0 to run" in capsys.readouterr().out
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}


def test_no_rate_above_the_knee(recipe):
    found = recipe({"a": 4, "b": 1}, rates={"per_second": [2, 30, 60, 90]}, slo={"ttft": 0.9}, seed=3)
    assert start(found) == 0
    assert list(states(found).values()) == ["done"] * 3 + ["past the knee"] * 2 + ["done"] * 5
    gains = read_group(found.folder)
    from astbench.tables.pages.deploy import tables

    rows = [{}, {}]
    for table in tables(gains, {})[:3]:
        for row, more in zip(rows, table.rows, strict=True):
            row.update(zip(table.head, more.cells, strict=True))
    assert rows[0]["held up to, requests a second"] == "2"
    assert rows[1]["held up to, requests a second"] == "at least 90, no higher rate tried"
    assert rows[1]["whole answers beside a's"] == "faster, of too few requests for an interval"


def test_a_server_that_dies_fails_its_cell_and_the_rest_goes_on(recipe, capsys):
    found = recipe({"a": 3, "b": 2, "c": 1})
    assert start(found) == 1
    told = states(found)
    assert told["a-32-20ps"] == "done" and told["a-32-40ps"] == "failed" and told["b-32-20ps"] == "failed"
    assert told["c-32-20ps"] == told["c-32-40ps"] == "done"
    record = json.loads(Path("runs/d/a-32-40ps/record.json").read_text())
    assert record["state"] == "failed" and record["error"].startswith("the server was killed by signal 9")
    said = capsys.readouterr().out
    assert "b-32-20ps: failed: the server ended with 7: out of memory on the CPU" in said
    assert [window for _, window in servers()] == [3, 2, 1] and all(gone(pid) for pid, _ in servers())
    assert start(found) == 1 and len(servers()) == 3  # not tried again by itself
    assert start(found, retry=True) == 1
    assert states(found)["a-32-40ps"] == "done" and len(servers()) == 5  # a new one has not had its 18th request


def test_nobody_waits_for_the_requests_of_a_dead_server(recipe):
    """The seventh request is the first of a minute of them."""
    found = recipe({"a": 5}, rates={"per_second": [1]}, load=[{"length": 32, "output": 4, "requests": 60}])
    began = time.monotonic()
    assert start(found) == 1
    assert time.monotonic() - began < 40 and states(found)["a-32-1ps"] == "failed"


def test_requests_have_exactly_so_many_tokens_and_are_the_same_for_all(recipe):
    found = recipe({"a": 1, "b": 1})
    made = [workload.Workload(found).bodies(found.loads[0], 5) for _ in range(2)]
    assert made[0] == made[1] and len({tuple(body["prompt"]) for body in made[0]}) > 1
    assert all(len(body["prompt"]) == 28 and body["max_tokens"] == 4 for body in made[0])  # 32 together
    text = Path("t.txt").read_text()
    assert all(bytes(body["prompt"]).decode() in text for body in made[0])
    asked = recipe({"a": 1}, path="/answer", load=[{"length": 32, "requests": 5}], slo={"latency": 1}, question="who")
    documents = workload.Workload(asked).bodies(asked.loads[0], 5)
    assert all(len(body["document"]) == 32 and body["document"] in text for body in documents)
    assert {body["question"] for body in documents} == {"who"}


def test_cells_of_a_capacity_that_failed_say_so(recipe):
    found = recipe({"a": 2, "b": 1}, rates={"of_capacity": [1]})
    assert start(found) == 1
    why = {one.cell.name: one.why for one in plan(found)}
    assert why["b-32-1x"] == "a-32-capacity failed, which says at what rate requests come"


def test_another_recipe_in_the_same_folder_is_refused(recipe):
    start(recipe({"a": 1}, rates={"per_second": [20]}))
    with pytest.raises(ConfigError, match=r"a-32-20ps holds another cell: requests is 6 there and 7 here"):
        start(recipe({"a": 1}, rates={"per_second": [20]}, load=[{"length": 32, "output": 4, "requests": 7}]))


def test_what_a_kill_leaves_behind_is_no_obstacle(recipe):
    found = recipe({"a": 1}, rates={"per_second": [20]})
    folder = Path("runs/d/a-32-20ps")
    folder.mkdir(parents=True)
    (folder / "items.json").write_text("{}")
    (folder / ".record.json.x.tmp").write_text("{")
    assert start(found) == 0
    (folder / "record.json").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="a-32-20ps holds files and no record"):
        start(found)


def test_a_text_that_is_too_short(recipe):
    with pytest.raises(DataError, match=r"t.txt has 300 tokens and a prompt needs 396; name a longer text"):
        start(recipe({"a": 1}, load=[{"length": 400, "output": 4, "requests": 1}]))
    assert not servers()


def test_an_edited_record_is_found_out(recipe):
    found = recipe({"a": 1}, rates={"per_second": [20]})
    start(found)
    file = Path("runs/d/a-32-20ps/record.json")
    record = json.loads(file.read_text())
    read_group(found.folder)
    record["load"]["ttft_seconds"]["p50"]["value"] /= 2
    file.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"load.ttft_seconds.p50.value is .* one of the two was edited"):
        read_group(found.folder)
    (file.parent / "items.json").unlink()
    with pytest.raises(DataError, match=r"items\.json"):
        read_group(found.folder)


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL], ids=["SIGTERM", "SIGKILL"]
)
def test_a_stop_leaves_no_server(recipe, how):
    found = recipe({"a": 1}, rates={"per_second": [0.01]})
    code = (
        "import sys; from astbench.sweeps import local; from astbench.deploy import workload; "
        "from tests.astbench.deploy.test_run import Letters, STAND_IN; local.CHILD = STAND_IN; "
        "workload.load_tokenizer = lambda _: Letters(); from astbench.cli import main; "
        "sys.exit(main(['deploy-test', 'r.yaml']))"
    )
    places = [ROOT, ROOT / "registry", ROOT / "kernels"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        journal = Path("runs/d/sweep.json")
        while not journal.exists() or '"a-32-0.01ps"' not in journal.read_text():
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        time.sleep(0.5)  # it waits for its first request's time
        process.send_signal(how)
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    end = time.monotonic() + 10
    while not all(gone(pid) for pid, _ in servers()) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(gone(pid) for pid, _ in servers())
    assert (
        states(found) == {"a-32-capacity": "done", "a-32-0.01ps": "to run"} and not Path("runs/d/a-32-0.01ps").exists()
    )


def test_requests_that_failed_are_never_good():
    from astbench.loadtest.objective import Objective

    slow = Sent(0.0, 0.0, 3.0, "200", (1.0, 2.0, 3.0))
    assert Objective(ttft=1.0, tpot=1.0).met(slow) and not Objective(ttft=0.9).met(slow)
    assert not Objective(tpot=0.9).met(slow) and not Objective(latency=2.0).met(slow)
    assert not Objective().met(Sent(0.0, 0.0, 0.1, "cut off", (0.1,)))


@pytest.mark.slow
def test_with_real_servers(astbench, tmp_path, monkeypatch):
    from tests.astbench.serving.conftest import TEXTS, saved

    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model")
    Path("t.txt").write_text("\n".join(TEXTS))
    said = {
        "model": "model",
        "text": "t.txt",
        "servers": {
            "dense": {"attention": "dense"},
            "ast": {"attention": {"name": "ast", "block_size": 4, "lists": "carried"}},
        },
        "serve": {"max_batch": 2, "dtype": "bfloat16", "threads": 1},
        "load": [{"length": 40, "output": 4, "requests": 20}],
        "rates": {"of_capacity": [0.2]},
        "slo": {"ttft_times": 1000, "tpot": 100},
    }
    Path("r.yaml").write_text(yaml.safe_dump(said))
    done = astbench("deploy-test", "r.yaml")
    assert done.code == 0, done.out + done.err
    record = json.loads(Path("runs/r/ast-40-0.2x/record.json").read_text())
    assert record["served"]["attention"]["lists"] == "carried" and record["load"]["answered"] == 20
    items = json.loads(Path("runs/r/ast-40-0.2x/items.json").read_text())["load"]
    assert all(len(row["tokens"]) == 4 for row in items.values())
    shown = astbench("table", "r", "--results=runs", "--format=csv")
    assert shown.code == 0 and "ast,40," in shown.out and " to " in shown.out  # an interval
