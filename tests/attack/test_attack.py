"""The runner of `make attack` runs, and says what holds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_few_trials_hold():
    words = [sys.executable, "-m", "tests.attack", "--seconds=16", "--only=A,C"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in table] == ["kind", "A", "C"]
    assert all(int(row[-2]) == int(row[-1]) > 0 for row in table[1:])
