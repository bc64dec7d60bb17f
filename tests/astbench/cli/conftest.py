"""What the command line's hostile tests share: a finished run, one that is not done, and a stranger's module."""

import shutil

import pytest

from astbench.runs.folder import DONE
from tests.astbench.cli.commands import FIT


@pytest.fixture(scope="session")
def base(run, tmp_path_factory):
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("hostile") / "base"
    code, said = run([*FIT, "--checkpoint_every=1", f"--run_dir={folder}"])
    assert code == 0, said
    return folder


@pytest.fixture
def stopped(base, tmp_path):
    """A copy of the run that is not done yet."""
    folder = shutil.copytree(base, tmp_path / "run")
    (folder / DONE).unlink()
    return folder


@pytest.fixture
def evil(tmp_path):
    """A module that leaves a trace when it is imported."""
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Evil: pass\n")
    return tmp_path / "evil.py", trace
