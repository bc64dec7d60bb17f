"""Which processes of a run this one is, by its environment; before Lightning is imported, which reads it too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from astbench import console
from astbench.errors import MissingPackageError

_LEADER = "ASTBENCH_LEADER"


@contextmanager
def leading() -> Iterator[None]:
    """Within, the processes that this one starts are its children."""
    if is_child():
        yield
        return
    os.environ[_LEADER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_LEADER]


def is_child() -> bool:
    """Whether another process of the same run started this one; its environment alone could be anybody's."""
    return os.environ.get(_LEADER) == str(os.getppid())


def check_interpreter() -> None:
    """Refuse a Python that leaves docstrings out: transformers reads its own while it is imported.

    Raises:
        MissingPackageError: it does.
    """
    if sys.flags.optimize > 1:
        raise MissingPackageError(
            "Python runs without docstrings (python -OO, PYTHONOPTIMIZE=2), and transformers does not load without its "
            "own; set PYTHONOPTIMIZE=1, or unset it"
        )


def drop_strays() -> None:
    """Take out of the environment what says that a launcher started this process, when none did.

    A shell within torchrun's or Slurm's hands such variables on, and Lightning would wait for processes that nobody
    starts, or keep silent as one that is not the first.
    """
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        _drop("LOCAL_RANK", "WORLD_SIZE")
    if "SLURM_NTASKS" in os.environ and "SLURM_PROCID" not in os.environ:
        _drop("SLURM_NTASKS", "SLURM_PROCID")


def _drop(name: str, lacking: str) -> None:
    value = os.environ.pop(name)
    console.tell(f"astbench: note: {name}={value} is not heeded: no launcher set it, {lacking} is missing")
