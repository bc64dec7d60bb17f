"""A deployment test's file: what it says, and how it refuses."""

from pathlib import Path

import pytest
import yaml

from astbench.deploy.cells import Calibration, cell_of, rate_of
from astbench.deploy.recipe import read_recipe
from astbench.errors import ConfigError
from astbench_registry.errors import RegistryError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes" / "deploy").glob("*.yaml"))
GOOD = {
    "model": "m",
    "text": "t.txt",
    "servers": {"dense": {"attention": "dense"}, "near": {"attention": {"name": "local", "window": 8}}},
    "load": [{"length": 64, "output": 8, "requests": 3}, {"length": 32, "requests": 5}],
    "rates": {"of_capacity": [2, 0.5]},
    "slo": {"ttft_times": 3, "tpot": 0.25},
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made(**changes):
        said = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
        Path("r.yaml").write_text(yaml.safe_dump(said))
        return read_recipe(Path("r.yaml"))

    return made


def test_what_a_file_says(read):
    found = read(serve={"threads": 2}, seed=7)
    assert [one.name for one in found.servers] == ["dense", "near"] and found.reference.name == "dense"
    assert [(load.length, load.output) for load in found.loads] == [(32, 16), (64, 8)]  # by length
    assert found.rates == (0.5, 2.0) and found.of_capacity and found.seed == 7
    words = found.servers[1].words(found.serve, ["mine.py"])
    assert words[:4] == ["serve", "m", "--attention=local", "--attention.window=8"]
    assert {"--threads=2", "--max_batch=8", "--plugins=mine.py", "--port=0"} <= set(words)
    cell = cell_of(found, found.servers[1], found.loads[1], 0.5)
    assert cell.name == "near-64-0.5x" and cell.folder == Path("runs/r/near-64-0.5x")
    rate, objective = rate_of(found, cell, Calibration({"latency": 9.0, "ttft": 0.5, "tpot": 0.01}, 3.0))
    assert rate == 1.5 and objective.said() == {"ttft": 1.5, "tpot": 0.25}


def test_absolute_rates_need_no_capacity(read):
    found = read(rates={"per_second": [4]}, slo={"ttft": 1})
    assert not found.calibrated
    cell = cell_of(found, found.reference, found.loads[0], 4.0)
    assert cell.name == "dense-32-4ps" and rate_of(found, cell, None)[0] == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no model"),
        ({"serve": {"port": 1}}, "serve takes no 'port'; it takes device, dtype"),
        ({"serve": {"max_batch": [1]}}, "serve.max_batch must be a value"),
        ({"path": "/translate"}, "path must be one of /v1/completions, /answer"),
        ({"servers": {"a/b": {"attention": "dense"}}}, "servers: 'a/b' cannot be the name"),
        ({"servers": {"a": {"attention": {"name": "local", "windw": 3}}}}, "servers.a: attention 'local' has no"),
        ({"servers": {"a": {"attention": {"window": 3}}}}, "servers.a has no attention, and m is no run"),
        ({"servers": {"a": {"attention": "locl"}}}, "did you mean 'local'"),
        ({"load": [{"length": 9, "output": 9, "requests": 1}]}, "load[0].length must be a whole number of at least 10"),
        ({"load": [{"length": 99, "requests": True}]}, "load[0].requests must be a whole number"),
        ({"load": [{"length": 99}]}, "load[0] needs length and requests"),
        ({"load": [{"length": 99, "requests": 1}] * 2}, "load has the length 99 twice"),
        ({"load": [{"length": 99, "requests": 1, "output": 1}]}, "load[0].output must be at least 2"),
        ({"load": []}, "load must be a list with something in it"),
        ({"rates": {"per_second": [1], "of_capacity": [1]}}, "rates must have one of of_capacity and per_second"),
        ({"rates": {"per_second": [0]}}, "rates.per_second must be a number above 0"),
        ({"rates": {"per_second": [1, 1]}}, "rates.per_second has 1 twice"),
        ({"slo": {"ttft": 1, "ttft_times": 2}}, "slo has ttft and ttft_times"),
        ({"slo": {"p99": 1}}, "slo takes no 'p99'"),
        ({"path": "/answer", "slo": {"latency": 1}}, "load[0].output is for /v1/completions"),
        ({"good_share": 1.5}, "good_share must be a number above 0 and at most 1"),
        ({"speed": 3}, "r.yaml takes no 'speed'"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(read, changes, message):
    with pytest.raises((ConfigError, RegistryError)) as refused:
        read(**changes)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_ends_with_one_line(astbench, tmp_path):
    done = astbench("deploy-test", tmp_path / "none.yaml")
    assert done.code == 2 and "none.yaml cannot be read" in done.err and done.err.count("\n") == 1
    assert "deploy-test" in astbench("--help").out and "--retry" in astbench("deploy-test", "--help").out


def test_a_run_brings_its_attention(read, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("attention: {name: local, window: 8}\ntask: {name: triviaqa}\n")
    answer = {"path": "/answer", "load": [{"length": 64, "requests": 1}], "slo": {"latency": 1}, "model": None}
    found = read(servers={"near": {"model": "run"}}, **answer)
    assert found.reference.of_run and found.reference.attention == {"name": "local", "window": 8}
    assert found.reference.words({}, [])[:3] == ["serve", "run", "--port=0"]
    with pytest.raises(ConfigError, match="a run is served as it was trained"):
        read(servers={"near": {"model": "run", "attention": "dense"}}, **answer)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_parse(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in yaml.safe_load(file.read_text())["servers"].values():  # runs that are made before
        if "model" in one:
            (tmp_path / one["model"]).mkdir(parents=True)
            (tmp_path / one["model"] / "config.yaml").write_text("attention: dense\n")
    found = read_recipe(file)
    wanted = ["dense", "ast", "local", *(["longformer"] if file.stem != "quick" else [])]
    assert [one.name for one in found.servers] == wanted
    assert found.loads[0].length == 256 and found.loads[-1].length == 8192
    assert found.folder == Path(f"runs/deploy-{file.stem}")
