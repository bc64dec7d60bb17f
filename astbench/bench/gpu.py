"""Everything that needs a CUDA device, in one go: `python -m astbench.bench.gpu`, which is `make gpu`.

The Hopper kernels' checks and times, the kernels' tests, ceilings of the device, then the recipes `gpu-*.yaml`, each
under its own time limit and all under one; what fails stops nothing else. The summary is written anew after every
step. Beside this package it needs torch, triton, PyYAML and matplotlib, for the tests pytest: neither Lightning nor the
`astbench` command's parser.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from astbench.bench.config import BenchConfig
from astbench.bench.goals import GOALS
from astbench.bench.processes import Worker
from astbench.console import say
from astbench.errors import AstbenchError, ConfigError, MissingPackageError
from astbench.files.writing import write_json, write_text
from astbench.runs.folder import RECORD

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "bench"
ORDER = "shared-128 shared-64 layer token decode-16 decode-1 uneven million".split()
"""Recipes, what matters most first: the time may not do for all."""
HOPPER_SECONDS, TEST_SECONDS, CEILING_SECONDS = 90.0, 80.0, 20.0


def main(words: Sequence[str] | None = None) -> int:
    """Run it; 0 when tests passed and every recipe left a record, whatever the numbers are.

    Exit codes as the `astbench` command's: 2 for options, 7 without a CUDA device.
    """
    parser = argparse.ArgumentParser(
        prog="python -m astbench.bench.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder for records and summary")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--only", default=",".join(ORDER), help="recipes, separated by commas")
    parser.add_argument("--skip_tests", action="store_true", help="go straight to the ceilings: no checks either")
    given = parser.parse_args(words)
    try:
        return _run(given.out, given.budget, given.only.split(","), tests=not given.skip_tests)
    except AstbenchError as error:
        print(f"astbench: error: {error}", file=sys.stderr)
        return error.exit_code


def _run(out: Path, budget: float, only: list[str], *, tests: bool) -> int:
    import torch

    unknown = [name for name in only if name not in ORDER]
    if unknown:
        raise ConfigError(f"--only must be some of {', '.join(ORDER)}, got {unknown[0]}")
    if not RECIPES.is_dir():
        raise ConfigError(f"{RECIPES} is not there; run from a checkout")
    if not torch.cuda.is_available():
        raise MissingPackageError("a CUDA device is needed, and torch finds none; run where there is one")
    taken = [path for path in (out / "summary.json", *(out / name for name in only)) if path.exists()]
    if taken:
        raise ConfigError(f"{taken[0]} is there already; move it away, or name another folder (OUT=... or --out=...)")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    summary = _begin(budget)
    if tests:
        summary["hopper"] = _hopper(min(HOPPER_SECONDS, end - time.monotonic()))
        say(f"Hopper kernels: {summary['hopper']['state']}")
        summary["tests"] = _tests(out, min(TEST_SECONDS, end - time.monotonic()))
        say(f"tests: {summary['tests']['state']}")
    summary["ceilings"] = _ceilings(min(CEILING_SECONDS, end - time.monotonic()))
    say(f"ceilings: {summary['ceilings']}")
    with Worker() as worker:
        for name in only:
            summary["recipes"][f"gpu-{name}"] = _recipe(name, out, end - time.monotonic(), worker)
            _write(out, summary)
    say(f"\n{(out / 'summary.md').read_text(encoding='utf-8')}\nsummary     {out / 'summary.md'}")
    good = all(summary[part]["state"] in ("passed", "not run") for part in ("hopper", "tests"))
    return 0 if good and all(recipe["state"] == "done" for recipe in summary["recipes"].values()) else 1


def _begin(budget: float) -> dict[str, Any]:
    from astbench.runs.record import SCHEMA, git_state, hardware, versions

    return {
        "schema": SCHEMA,
        "command": "gpu",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "budget_seconds": budget,
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "hopper": {"state": "not run", "cases": {}, "times": []},
        "tests": {"state": "not run"},
        "ceilings": {},
        "recipes": {},
    }


def _hopper(seconds: float) -> dict[str, Any]:
    from astbench.bench.hopper import step

    return step(seconds)


def kernel_tests() -> list[str]:
    """The files that test the Triton kernels; without those that need no GPU: what compiles ahead of time, and Gluon's.

    The kernels in Gluon have a step of their own.
    """
    folder = ROOT / "tests" / "kernels" / "triton"
    return [str(f) for f in sorted(folder.glob("test_*.py")) if f.stem not in ("test_compile", "test_hopper")]


def _tests(out: Path, seconds: float) -> dict[str, Any]:
    """The Triton kernels compiled instead of interpreted, and what is marked `gpu`."""
    files = kernel_tests()
    if not files or find_spec("pytest") is None:
        return {"state": "not run", "why": "no tests here, or no pytest"}
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    # pytest-benchmark, where a machine has it, warns beside xdist, and warnings are errors.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    calls = [
        [*pytest, *workers, *files],
        [*pytest, "-m", "gpu", *(str(ROOT / "tests" / part) for part in ("gpu", "kernels", "registry"))],
    ]
    end, state, last = time.monotonic() + seconds, "passed", []
    with open(out / "tests.txt", "w+", encoding="utf-8") as log:
        for call in calls:
            start = log.tell()
            try:
                left = max(1.0, end - time.monotonic())
                code = subprocess.run(call, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=left).returncode
                # 5: none were found, as where nothing is marked `gpu`.
                state = state if code in (0, 5) else "failed"
            except subprocess.TimeoutExpired:
                state = "failed" if state == "failed" else f"not finished after {seconds:.0f} s"
            log.seek(start)
            last.append((log.read().strip().splitlines() or ["nothing was printed"])[-1])
    return {"state": state, "last_lines": last, "log": "tests.txt"}


def _ceilings(seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "astbench.bench.ceilings"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return {"why": f"not finished after {seconds:.0f} s"}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _recipe(name: str, out: Path, left: float, worker: Worker) -> dict[str, Any]:
    """How a recipe ended; its cells are in its record."""
    if left <= 1:
        return {"state": "not run", "why": "no time was left"}
    config = recipe(name)
    config = replace(config, time_limit=min(config.time_limit, left), run_dir=str(out / name))
    say(f"\n{name}, at most {config.time_limit:.0f} s")
    start = time.monotonic()
    try:
        from astbench.bench.run import run_bench

        run_bench(config, [f"--config=recipes/bench/gpu-{name}.yaml", f"--time_limit={config.time_limit:g}"], worker)
        ended = {"state": "done"}
    except Exception as error:  # whatever a recipe ends with, the others are still to be run
        ended = {"state": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        say(f"{name}: {ended['why']}")
    return {**ended, "seconds": round(time.monotonic() - start, 1), "record": f"{name}/{RECORD}"}


def recipe(name: str) -> BenchConfig:
    """Of a name in :data:`ORDER`."""
    import yaml

    return BenchConfig(**yaml.safe_load((RECIPES / f"gpu-{name}.yaml").read_text(encoding="utf-8")))


def _write(out: Path, summary: dict[str, Any]) -> None:
    summary["goals"] = goals(out, summary["recipes"])
    write_json(out / "summary.json", summary)
    write_text(out / "summary.md", markdown(summary))


def goals(out: Path, recipes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with what the records say of it."""
    found = []
    for goal in GOALS:
        ended = recipes.get(goal.recipe, {"why": "its recipe was not run"})
        file = out / ended.get("record", "")
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        why = ended.get("why") or record.get("error", "")
        found.append(goal.result(record.get("cells"), why) | {"record": ended.get("record", "")})
    return found


def markdown(summary: dict[str, Any]) -> str:
    """The summary for people."""
    from astbench.bench.hopper import markdown as hopper_lines

    device = ", ".join(summary["hardware"].get("gpus", ["no GPU"]))
    versions = ", ".join(f"{name} {summary['versions'].get(name, '-')}" for name in ("torch", "triton"))
    commit = (summary["git"] or {}).get("commit", "unknown")[:12]
    ceilings = summary["ceilings"]
    lines = [
        f"# {device}",
        "",
        f"{summary['started']}, {versions}, commit {commit}. Tests: {summary['tests']['state']}.",
        "",
        "| ceiling | measured |",
        "| --- | ---: |",
        *(
            f"| {what} | {format(ceilings[key], ',.0f') if key in ceilings else ceilings.get('why', 'not measured')} |"
            for what, key in (
                ("copy in memory, read plus written, GB/s", "copy_gbs"),
                ("copy in L2, read plus written, GB/s", "l2_gbs"),
                ("matmul, bfloat16, TFLOP/s", "matmul_bf16_tflops"),
            )
        ),
        *hopper_lines(summary["hopper"]),
        "",
        "| what | tokens | floor | goal | measured | reached | record |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for goal in summary["goals"]:
        sign = ">=" if goal["rising"] else "<="
        measured = "-" if goal["value"] is None else f"{goal['value']:.4g} {goal['unit']}"
        reached = goal["reached"] + (f": {goal['why']}" if goal["value"] is None and goal["why"] else "")
        bounds = f"{sign} {goal['floor']:g} | {sign} {goal['goal']:g}"
        lines.append(f"| {goal['what']} | {goal['length']:,} | {bounds} | {measured} | {reached} | {goal['record']} |")
    lines += ["", "| recipe | state | seconds |", "| --- | --- | ---: |"]
    for name, ended in summary["recipes"].items():
        state = ended["state"] + (f": {ended['why']}" if "why" in ended else "")
        lines.append(f"| {name} | {state} | {ended.get('seconds', '-')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
