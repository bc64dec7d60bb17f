"""Commands in processes of their own, which kill themselves at a chosen moment."""

import gc
import multiprocessing
import os
import sys

import torch

PRELOADED = [
    "astbench.cli.lightning",
    "astbench.tasks.qa.task",
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "tests.astbench.processes",
]
"""What the server of processes imports once, for all of them: most of what a command takes on a tiny model."""


class Runner:
    """`run(words, end)` -> (exit code, what it printed), in a fresh process that has the heavy imports behind it.

    Attributes:
        errors: What the last command wrote to stderr; it is the end of what it printed too.
    """

    errors = ""

    def __init__(self, folder):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.files = [folder / name for name in ("out.txt", "err.txt")]

    def __call__(self, words, end=None):
        process = self.context.Process(
            target=child, args=([str(w) for w in words], [str(file) for file in self.files], end)
        )
        process.start()
        process.join(300)
        assert process.exitcode is not None, "still running"
        out, self.errors = (file.read_text() for file in self.files)
        return process.exitcode, out + self.errors


def child(words, files, end):
    """Run a command; at `end` = (what, number, signal) the process sends itself the signal."""
    gc.freeze()  # what the server has imported stays, and a collection would copy its pages
    torch.set_num_threads(1)
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    if end is not None:
        arm(*end)
    from astbench.cli import main

    sys.exit(main(words))


def arm(what, number, how):
    """Send this process the signal `how` when `what` happens for the time `number`, counted from 0."""
    from astbench.cli.run_callback import RunCallback

    count = 0

    def tick(*_):
        nonlocal count
        if count == number:
            os.kill(os.getpid(), how)
        count += 1

    if what == "rename":
        # Every atomic write renames: checkpoints (four times each), the manifest, the record, the log's header.
        rename = os.replace
        os.replace = lambda *a, **k: (tick(), rename(*a, **k))
    else:
        before = getattr(RunCallback, what)
        setattr(RunCallback, what, lambda *a, **k: (tick(), before(*a, **k))[1])
