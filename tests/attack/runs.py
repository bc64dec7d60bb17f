"""Tiny runs that trials start from, made once, and what two of them differ in."""

import json
import shutil
import signal
from pathlib import Path

import torch

from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import DONE, LAST, METRICS, RECORD
from tests.astbench.conftest import NAMES
from tests.astbench.processes import arm
from tests.attack.commands import demand, run

QUICK = ["--trainer.log_every_n_steps=1"]
QA = [
    "--data.demo_train=20",
    "--data.demo_eval=4",
    "--data.max_length=128",
    "--data.stride=32",
    "--data.max_question=32",
    "--data.batch_size=4",
    *QUICK,
]
FIT = ["fit", *NAMES, *QA]
"""A fit but for its `--trainer.max_steps`."""

STOPPED = [*FIT, "--trainer.max_steps=6", "--checkpoint_every=1"]
"""The run that :meth:`Shared.stopped` leaves behind."""


class Shared:
    """Folders that several trials use.

    Attributes:
        folder: Where they are.
        found: What was made once, by name.
    """

    def __init__(self, folder):
        self.folder, self.found = Path(folder), {}

    def once(self, name, make):
        """What `make(folder)` returned for this name, the first time."""
        if name not in self.found:
            folder = self.folder / name
            folder.mkdir()
            self.found[name] = make(folder)
        return self.found[name]

    def whole(self, name, words):
        """Folder of an uninterrupted run, and the seconds that it took."""

        def make(folder):
            ended = run([*words, f"--run_dir={folder / 'run'}"], folder)
            ended.must_be_clear(0)
            return folder / "run", ended.seconds

        return self.once(f"whole-{name}", make)

    def stopped(self, folder):
        """A copy in `folder` of a run that was killed at step 4, with two checkpoints."""

        def make(place):
            words = [*STOPPED, f"--run_dir={place / 'run'}"]
            ended = run(words, place, before=lambda: arm("on_train_batch_start", 4, signal.SIGKILL))
            demand(ended.code == -signal.SIGKILL, ended.last)
            return place / "run"

        return shutil.copytree(self.once("stopped", make), folder)


def same(ours, theirs):
    """Whether nested plain data and tensors are one, bit by bit."""
    (ours, shape), (theirs, other) = map(torch.utils._pytree.tree_flatten, (ours, theirs))
    pairs = zip(ours, theirs, strict=False)
    return shape == other and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def differences(folder, whole):
    """The parts in which two finished runs differ."""
    ours, theirs = ((read_checkpoint(f / LAST) if (f / LAST).exists() else {}) for f in (folder, whole))
    parts = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "average")
    found = [part for part in parts if not same(ours.get(part), theirs.get(part))]
    for name in (METRICS, "items.json"):
        texts = [(f / name).read_bytes() if (f / name).exists() else None for f in (folder, whole)]
        found += [name] * (texts[0] != texts[1])
    ours, theirs = (json.loads((f / RECORD).read_text()) for f in (folder, whole))
    found += [f"record: {key}" for key in ("state", "metrics", "density", "data") if ours.get(key) != theirs.get(key)]
    found += ["no done.json"] * ((whole / DONE).exists() and not (folder / DONE).exists())
    return found + [f"{left.name} left behind" for left in folder.glob(".*.tmp")]
