"""Commands of the hostile tests: a small fit, a process of its own, and its limits."""

import resource
import subprocess
import sys

from tests.astbench.conftest import NAMES

SMALL = [
    "--data.demo_train=16",
    "--data.demo_eval=4",
    "--data.max_length=128",
    "--data.stride=32",
    "--data.max_question=32",
    "--data.batch_size=4",
    "--trainer.max_steps=3",
    "--trainer.log_every_n_steps=1",
]
FIT = ["fit", *NAMES, *SMALL]


def command(*words, **options):
    """A command in a process of its own."""
    words = [sys.executable, "-m", "astbench", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


def limited(what, most):
    """Hold a process to a limit."""
    return lambda: resource.setrlimit(what, (most, most))
