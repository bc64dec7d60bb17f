"""Follows the checklists of CONTRIBUTING.md to the letter: in a copy of the tree, or as a plugin beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()

DRIVER = """
import contextlib, io, json, sys, warnings
from astbench.cli import main
done = []
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if words[0] == "pytest":
                import pytest
                code = int(pytest.main(words[1:]))
            else:
                code = main(words)
        except SystemExit as end:
            code = end.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
print("\\n" + json.dumps(done))
"""
"""Several commands for one start of Python."""


@dataclass(frozen=True)
class Step:
    """One item of a checklist: a file, and what goes into it (a diff, where the file is there)."""

    path: str
    language: str = ""
    code: str = ""


def steps(kind: str) -> list[Step]:
    """The numbered items of the section "Add a `kind`"."""
    section = re.search(rf"^## Add a {kind}\n(.*?)(?=^## )", GUIDE, re.M | re.S)
    assert section is not None
    found = []
    for item in re.split(r"^(?=\d+\. `)", section[1], flags=re.M)[1:]:
        path = re.match(r"\d+\. `([^`]+)`", item)
        code = re.search(r"^   ```(\w+)\n(.*?)^   ```$", item, re.M | re.S)
        assert path is not None
        found.append(Step(path[1], code[1], dedent(code[2])) if code else Step(path[1]))
    return found


def stated(kind: str) -> tuple[int | None, int | None]:
    """What the table says: how many files as one's own, and in the repository."""
    row = re.search(rf"^\| \[a {kind}\]\(#add-a-{kind}\) \| (.*?) \| (.*?) \|$", GUIDE, re.M)
    assert row is not None
    own, inside = (None if cell == "-" else int(cell.split()[0]) for cell in row.groups())
    return own, inside


def example(name: str) -> str:
    """The code between two markers."""
    code = re.search(rf"<!-- {name}:begin -->\n```python\n(.*?)```\n<!-- {name}:end -->", GUIDE, re.S)
    assert code is not None
    return code[1]


class Tree:
    """A copy of this tree, by links; what a checklist touches is copied.

    Attributes:
        root: The copy.
        cwd: Where commands run, beside it.
        touched: Kind of change -> the files that its checklist touched.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.cwd = folder / "tree", folder / "work"
        self.root.mkdir()
        self.cwd.mkdir()
        self.touched: dict[str, set[str]] = {}
        for name in ("astbench", "registry", "kernels", "recipes", "tests", "pyproject.toml"):
            (self.root / name).symlink_to(ROOT / name)

    def follow(self, kind: str, **instead: str) -> None:
        """Do what the checklist says; `instead` gives, by file name, what an item describes in words."""
        for step in steps(kind):
            code = step.code or instead[Path(step.path).stem]
            self._open(step.path)
            (self._edit if step.language == "diff" else self._create)(self.root / step.path, code)
            self.touched.setdefault(kind, set()).add(step.path)

    def _open(self, path: str) -> None:
        """Make the folders above real ones."""
        for folder in [self.root / parent for parent in reversed(Path(path).parents)][1:]:
            if folder.is_symlink():
                target = folder.resolve()
                folder.unlink()
                folder.mkdir()
                for entry in target.iterdir():
                    if entry.name == "__pycache__":
                        shutil.copytree(entry, folder / entry.name)
                    else:
                        (folder / entry.name).symlink_to(entry)
            folder.mkdir(exist_ok=True)

    @staticmethod
    def _create(path: Path, code: str) -> None:
        assert not path.exists(), f"{path.name} is there already"
        path.write_text(code)

    @staticmethod
    def _edit(path: Path, diff: str) -> None:
        lines, at = path.read_text().splitlines(), 0
        path.unlink()  # most often a link
        for line in diff.splitlines():
            sign, text = line[0], line[1:]
            if sign == "+":
                lines.insert(at, text)
                at += 1
                continue
            assert text in lines[at:], f"{path.name} has no line {text!r} there"
            at = lines.index(text, at) + 1
            if sign == "-":
                at -= 1
                del lines[at]
        path.write_text("\n".join(lines) + "\n")

    def lint(self, *kinds: str) -> None:
        """Style of what these changes touched."""
        files = [path for kind in kinds for path in sorted(self.touched[kind]) if path.endswith(".py")]
        ruff = str(Path(sys.executable).parent / "ruff")
        for check in (["check"], ["format", "--check"]):
            command = [ruff, *check, "--no-cache", *files]
            done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *commands: list[str], before: str = "") -> list[Outcome]:
        """Command lines of `astbench`, or of pytest with what the checklist's test needs, in one process."""
        roots = [self.root, self.root / "registry", self.root / "kernels"]
        done = subprocess.run(
            [sys.executable, "-c", before + DRIVER],
            cwd=self.cwd,
            input=json.dumps([self._words(command) for command in commands]),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [Outcome(*one) for one in json.loads(done.stdout.splitlines()[-1])]

    def _words(self, command: list[str]) -> list[str]:
        """Paths of the tree's own files, from where the commands run."""
        if command[0] == "pytest":
            options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
            # What the commands before imported keeps its plain assertions.
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", f"--rootdir={self.root}"]
            return ["pytest", *options, *(str(self.root / path) for path in command[1:])]
        return [word.replace("--config=recipes/", f"--config={self.root}/recipes/") for word in command]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def succeed(outcome: Outcome) -> str:
    """What a command printed; it must have ended well."""
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome.out


class Run:
    """Commands by name, and how each ended: `run["listed"].out`."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self._outcomes = tree, dict[str, Outcome]()

    def start(self, commands: dict[str, list[str]], before: str = "") -> Run:
        """Run all, one behind the other, in one process."""
        self._outcomes = dict(zip(commands, self.tree.run(*commands.values(), before=before), strict=True))
        return self

    def __getitem__(self, name: str) -> Outcome:
        return self._outcomes[name]
