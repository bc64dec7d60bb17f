"""`make gpu`: its goals from records that are made up, what it says of what failed, and the commands it would run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from astbench.bench import analysis, gpu, layers
from astbench.bench.goals import GOALS, Goal
from astbench.bench.plot import draw_curves

ROOT = Path(__file__).resolve().parents[3]


def cell(name, length, **seconds):
    """A cell whose every mode took so many seconds, at a quarter of the pairs, 100 bytes and 10^12 operations."""
    cost = {"peak_bytes": 100, "work_flops": 1e12, "least_bytes": 1e9, "density": 1.0 if name == "dense:x" else 0.25}
    modes = {mode.replace("_at_", "@"): {"seconds": [s], **cost} for mode, s in seconds.items()}
    return {"attention": name, "length": length, "asked": list(modes), **modes}


def made_up(recipe):
    """Cells of a recipe in which dense takes 8 s in every mode and at every length, and all else 1 s."""
    config = gpu.recipe(recipe.removeprefix("gpu-"))
    entries = layers.chosen(config, lambda line: None)
    found = []
    for length in config.lengths:
        dense = {mode: 8.0 for mode in config.modes.split(",")}
        found.append(cell("dense:x", length, **dense))
        for entry in entries:
            if entry.name != "dense":
                found.append(cell(entry.label, length, **{m.replace("@", "_at_"): 1.0 for m in entry.asked}))
    return found


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.recipe}-{goal.length}-{goal.what}")
def test_every_goal_is_found_in_the_cells_its_recipe_asks_for(goal):
    found = goal.result(made_up(goal.recipe))
    expected = {
        "R": 0.5,  # 1 / (0.25 x 8)
        "times faster": 1.0 if "FlexAttention" in goal.what else 8.0,
        "times the time": 1.0,
        "of the time": 0.0,
        "times dense": 1.0,
        "tokens": 1024.0,
        "ms": 1000.0,
    }
    assert found["value"] == expected[goal.unit], found
    assert found["reached"] == goal.verdict(found["value"])


def test_goals_use_every_recipe():
    assert {goal.recipe for goal in GOALS} == {f"gpu-{name}" for name in gpu.ORDER}
    assert {path.stem for path in gpu.RECIPES.glob("gpu-*.yaml")} == {f"gpu-{name}" for name in gpu.ORDER}


def test_the_time_limits_fit_in_the_budget():
    limits = sum(gpu.recipe(name).time_limit for name in gpu.ORDER)
    assert limits + gpu.HOPPER_SECONDS + gpu.TEST_SECONDS + gpu.CEILING_SECONDS <= 570
    for name in gpu.ORDER:
        assert gpu.recipe(name).device == "cuda"


@pytest.mark.parametrize(
    ("rising", "value", "reached"),
    [
        (False, 0.9, "goal"), (False, 1.0, "goal"), (False, 1.5, "floor"), (False, 2.1, "below"),
        (True, 2.1, "goal"), (True, 1.5, "floor"), (True, 0.9, "below"),
    ],
)  # fmt: skip
def test_floor_and_goal(rising, value, reached):
    low, high = 1.0, 2.0
    goal = Goal("x", "r", 8, lambda cells: {8: value}, ("a", "forward"), high, low, "R")
    if rising:
        goal = Goal("x", "r", 8, lambda cells: {8: value}, ("a", "forward"), low, high, "R", rising=True)
    assert goal.verdict(value) == reached


def test_a_goal_without_a_number_gives_the_reason():
    goal = next(g for g in GOALS if g.recipe == "gpu-shared-128" and g.unit == "times faster")
    cells = made_up(goal.recipe)
    name, mode = goal.row
    for one in cells:
        if one["attention"] == name:
            one[mode] = {"error": "unknown backend 'flex'"}
    assert goal.result(cells)["why"] == "unknown backend 'flex'"
    for one in cells:
        if one["attention"] == name:
            one["kernel"] = {"error": "gate: output is off"}
    assert goal.result(cells)["why"] == "gate: output is off"
    assert goal.result(None, "no time was left")["why"] == "no time was left"
    assert goal.result([])["why"] == f"the record has no {name} at 32,768 tokens"

    crossing = next(g for g in GOALS if g.unit == "tokens")
    slow = made_up(crossing.recipe)
    for one in slow:
        if one["attention"] == "dense:x":
            one["training"]["seconds"] = [0.5]
    found = crossing.result(slow)
    assert found["value"] is None and found["why"] == "slower than dense at every length up to 32,768"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What `gpu` asks torch, the tests and the ceilings, answered; recipes leave made-up records."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu, "_begin", lambda budget: {
            "started": "now", "git": None, "versions": {"torch": "2.11"}, "hardware": {"gpus": ["Some GPU"]},
            "hopper": {"state": "not run"}, "tests": {"state": "not run"}, "ceilings": {}, "recipes": {},
        },
    )  # fmt: skip
    monkeypatch.setattr(gpu, "_tests", lambda out, seconds: {"state": "passed"})
    timed = {"shape": "128 x 64, heads of 128, 1/8", "training": False, "dense_ms": 13.0}
    timed |= {"triton_hopper_ms": 1.9, "triton_hopper_R": 1.17, "triton_plain_ms": 2.9, "triton_plain_R": 1.8}
    hopper = {"state": "passed", "cases": {"causal": {"wrong": []}}, "times": [timed]}
    monkeypatch.setattr(gpu, "_hopper", lambda seconds: hopper)
    ceilings = {"copy_gbs": 2900.4, "l2_gbs": 5500.0, "matmul_bf16_tflops": 700.6}
    monkeypatch.setattr(gpu, "_ceilings", lambda seconds: ceilings)

    def bench(config, words, worker):
        folder = Path(config.run_dir)
        name = f"gpu-{folder.name}"
        if name == "gpu-token":
            raise RuntimeError("the device\nfell off")
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps({"cells": made_up(name)}))

    monkeypatch.setattr("astbench.bench.run.run_bench", bench)


def test_the_summary_holds_what_ran_and_what_did_not(on_a_gpu, tmp_path, capsys):
    out = tmp_path / "gpu"
    assert gpu.main([f"--out={out}", "--only=shared-128,token,layer"]) == 1
    summary = json.loads((out / "summary.json").read_text())
    states = {name: recipe["state"] for name, recipe in summary["recipes"].items()}
    assert states == {"gpu-shared-128": "done", "gpu-token": "failed", "gpu-layer": "done"}
    goals = {(g["what"], g["length"]): g for g in summary["goals"]}
    assert len(goals) == len(GOALS)
    share = goals["share of choosing in the layer, forward", 32768]
    assert (share["value"], share["reached"], share["record"]) == (0.0, "goal", "layer/record.json")
    text = (out / "summary.md").read_text()
    for line in (
        "# Some GPU",
        "| copy in memory, read plus written, GB/s | 2,900 |",
        "Hopper kernels: passed. Cases: 1, against float64.",
        "| 128 x 64, heads of 128, 1/8 | forward | 1.9 | 1.17 | 2.9 | 1.8 | hopper |",
        "| 128 rows a list, blocks of 64, density 1/8, forward | 32,768 | <= 1.45 | <= 1.2 | 0.5 R | goal "
        "| shared-128/record.json |",
        "| not measured: RuntimeError: the device fell off |",
        "| not measured: its recipe was not run |",
        "| gpu-token | failed: RuntimeError: the device fell off |",
    ):
        assert line in text, line
    assert "Some GPU" in capsys.readouterr().out


def test_recipes_get_no_more_time_than_is_left(on_a_gpu, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("astbench.bench.run.run_bench", lambda config, *_: given.append(config.time_limit))
    assert gpu.main([f"--out={tmp_path}", "--only=shared-128", "--budget=12"]) == 0
    assert 10 < given[0] <= 12
    given.clear()
    (tmp_path / "summary.json").unlink()
    assert gpu.main([f"--out={tmp_path}", "--only=shared-128", "--budget=0.5"]) == 1
    recipe = json.loads((tmp_path / "summary.json").read_text())["recipes"]["gpu-shared-128"]
    assert not given and recipe == {"state": "not run", "why": "no time was left"}


def test_the_kernels_tests_are_found():
    """Moved files would leave the GPU without a single test."""
    assert {Path(file).stem for file in gpu.kernel_tests()} == {
        "test_carried",
        "test_decode",
        "test_selection",
        "test_triton",
    }


def test_what_stands_in_the_way_is_one_line(on_a_gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "summary.json").touch()
    assert gpu.main([f"--out={tmp_path}"]) == 2
    assert "summary.json is there already" in capsys.readouterr().err
    assert gpu.main([f"--out={tmp_path}", "--only=x"]) == 2
    assert "--only must be some of shared-128" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([f"--out={tmp_path / 'new'}"]) == 7
    err = capsys.readouterr().err
    assert "a CUDA device is needed" in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "expected", "absent"),
    [
        ([], [".venv/bin/pip install", ".venv/bin/python -m astbench.bench.gpu --out=results/gpu --budget=570"], []),
        (["SYSTEM=1", "PYTHON=py"], [" py -m astbench.bench.gpu"], ["pip", ".venv"]),
        (
            ["WHEELS=wheels", "PYTHON=py", "OUT=there", "BUDGET=60"],
            ["py -m pip install --quiet --no-index --find-links=wheels", "/build/wheels", "--out=there --budget=60"],
            [".venv"],
        ),
    ],
    ids=["venv", "system", "wheels"],
)
def test_make_gpu(words, expected, absent, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    done = subprocess.run(["make", "-n", "-B", "gpu", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout
    for text in absent:
        assert text not in done.stdout


def test_what_gpu_imports_is_there_without_the_command_line():
    """A machine with torch and triton alone has no jsonargparse, no Lightning and no transformers."""
    code = """
import sys
for name in ("jsonargparse", "lightning", "transformers", "tokenizers", "rich", "safetensors"):
    sys.modules[name] = None
from astbench.bench import ceilings, gpu, plot, run, worker
from astbench.bench.layers import chosen
print([len(chosen(gpu.recipe(name), lambda line: None)) > 1 for name in gpu.ORDER])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "False" not in done.stdout


def test_the_picture_names_every_curve(tmp_path):
    """What is measured in one mode only, too."""
    found = [cell("dense", 8, forward=1.0), cell("ast", 8, kernel_decode=1.0, kernel_decode_at_flex=2.0)]
    draw_curves([tmp_path / "x.svg"], found, "title")
    text = (tmp_path / "x.svg").read_text()
    for label in ("dense", "ast kernel", "ast kernel@flex"):
        assert f"<!-- {label} -->" in text


def test_rates_of_made_up_cells():
    found = [cell("dense:x", 8, forward=2.0), cell("ast", 8, forward=0.5)]
    summary = analysis.summary(found[1], "forward")
    assert (summary["tflops"], summary["gbs"]) == (2.0, 2.0)
