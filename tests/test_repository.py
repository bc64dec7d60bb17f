"""The repository keeps its own rules: style, types, floors, packaging, documents."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from astbench.tasks import find_task

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def run(*command, cwd=ROOT, **options):
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]],
    ids=" ".join,
)
def test_lint(command):
    done = run(BIN / command[0], *command[1:])
    assert done.returncode == 0, done.stdout + done.stderr


def test_source_roots_are_not_packages():
    """`import kernels` must stay Hugging Face's, and `registry` nobody's."""
    assert not (ROOT / "registry" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    assert str(ROOT) not in run(sys.executable, "-c", code, cwd="/").stdout


def test_wheel_holds_exactly_the_three_packages(tmp_path):
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    top = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert top == {"astbench", "astbench_kernels", "astbench_registry"}
    for package in top:
        assert f"{package}/py.typed" in names
    tracked = run("git", "ls-files", "astbench", "registry", "kernels").stdout.split()
    code = {re.sub(r"^(registry|kernels)/", "", f) for f in tracked if f.endswith(".py")}
    assert code <= set(names), "tracked code that the wheel leaves out"


def test_python_torch_and_transformers_have_upper_bounds():
    """Up to the version that constraints.txt pins, which is the one that was tested."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = SpecifierSet(project["requires-python"])
    assert "3.11.0" in python and "3.13.9" in python and "3.14.0" not in python
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in ("torch", "transformers"):
            major, minor = map(int, pins[requirement.name].split(".")[:2])
            assert requirement.specifier.contains(f"{major}.{minor}.9")
            assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")


def test_recipes_that_need_an_extra_say_so():
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        text = file.read_text()
        config = yaml.safe_load(text)
        if (config.get("data") or {}).get("source") == "hub":
            assert "astbench[hub]" in text, file
        backbone = config.get("backbone")
        if isinstance(backbone, dict) and backbone.get("gguf_file"):
            assert "astbench[gguf]" in text, file


def test_make_demo_says_how_to_type_the_command():
    assert "source $(BIN)/activate" in (ROOT / "Makefile").read_text()
    assert "source .venv/bin/activate" in (ROOT / "README.md").read_text()


def test_git_tracks_every_source_file():
    """An ignore rule once swallowed a package."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = run("git", "status", "--porcelain", "--ignored", "astbench", "registry", "kernels", "tests").stdout
    lost = [line for line in ignored.splitlines() if line.startswith("!!") and "__pycache__" not in line]
    assert not lost


def test_records_hold_no_paths_of_a_machine():
    for file in (ROOT / "results").glob("*/*/record.json"):
        found = [word for word in json.loads(file.read_text()).get("argv", ()) if re.match(r"(--[\w.+]+=)?[/~]", word)]
        assert not found, f"{file}: {found}"


def test_constraints_pin_every_dependency_within_its_floor():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )  # name -> version
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    for text in [
        *project["dependencies"],
        *extras["test"],
        *extras["dev"],
        *extras["hub"],
        *extras["gguf"],
        *extras["baselines"],
        *extras["serve"],
    ]:
        requirement = Requirement(text)
        if requirement.name == "astbench":
            continue
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow the pinned {pin}"


BENCHES = sorted((ROOT / "recipes" / "bench").glob("*.yaml"))
DEPLOYED = set((ROOT / "recipes" / "deploy").glob("*.yaml"))  # read in tests/astbench/deploy/
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set(BENCHES) - DEPLOYED)

RESOLVE = """
import contextlib, io, json, sys
from astbench.cli import main
resolved = []
for command, recipe in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([command, f"--config={recipe}", "--print_config"])
        except SystemExit as end:
            code = end.code
    resolved.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(resolved))
"""


def test_recipes_parse(tmp_path):
    """Every option of every recipe exists and keeps its value in the resolved configuration."""
    wanted = [yaml.safe_load(recipe.read_text()) for recipe in RECIPES]
    calls = [[find_task(w["task"]["name"]).commands[0], str(recipe)] for w, recipe in zip(wanted, RECIPES, strict=True)]
    done = run(sys.executable, "-c", RESOLVE, cwd=tmp_path, input=json.dumps(calls))
    assert done.returncode == 0, done.stderr
    for recipe, options, (code, out, err) in zip(RECIPES, wanted, json.loads(done.stdout), strict=True):
        assert not code, f"{recipe}: {err}"
        resolved = yaml.safe_load(out)
        for group, values in options.items():
            for key, value in values.items():
                assert resolved[group][key] == value, f"{recipe}: {group}.{key}"


@pytest.mark.parametrize("recipe", BENCHES, ids=lambda path: path.stem)
def test_bench_recipes_parse(recipe):
    from astbench.cli.commands.bench import _parse

    config = _parse([f"--config={recipe}"])
    for key, value in yaml.safe_load(recipe.read_text()).items():
        assert getattr(config, key) == value


def test_every_variant_has_a_recipe():
    from astbench_registry.table import BUILTIN

    used = {yaml.safe_load(recipe.read_text())["attention"]["name"] for recipe in RECIPES}
    assert used == set(BUILTIN)
