"""Cells as jobs of a SLURM cluster, through submitit (Rapin and others, MIT licence)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError
from astbench.sweeps.launcher import PATIENCE, Ended, Launcher
from astbench.sweeps.remote import Errand
from astbench.sweeps.spec import Cell


@dataclass
class _Job:
    cell: Cell
    job: Any
    began: float


class Slurm(Launcher):
    """See the base class. A job that runs out of time, or must make room, saves and is queued again.

    Args:
        jobs: Most jobs in the queue or running.
        logs: Folder for what cells print; submitit's own files lie in its folder `slurm`.
        options: What submitit's `update_parameters` takes (`timeout_min`, `slurm_partition`, `cpus_per_task`,
            `gpus_per_node`, `mem_gb`, ...); `cluster` chooses another of its executors than SLURM's.
        plugins: Code that every cell loads.

    Raises:
        ConfigError: submitit is not installed, there is no SLURM here, or it takes no such option.
    """

    def __init__(self, jobs: int, logs: Path, options: Mapping[str, Any], plugins: Sequence[str]) -> None:
        super().__init__(jobs, logs)
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("--launcher=slurm needs submitit: pip install 'astbench[slurm]'") from error
        given = {"cluster": "slurm", "slurm_max_num_timeout": 100, **options}
        of_executor = {name: given.pop(name) for name in ("cluster", "slurm_max_num_timeout")}
        try:
            self._executor: Any = submitit.AutoExecutor(folder=logs / "slurm", **of_executor)
            self._executor.update_parameters(**given)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise ConfigError(f"--launcher=slurm: {' '.join(str(error).split())}") from error
        self._plugins = tuple(plugins)

    def _start(self, cell: Cell, words: list[str]) -> _Job:
        errand = Errand(cell, self._plugins, (self._logs / f"{cell.name}.log").absolute(), Path.cwd())
        self._executor.update_parameters(name=f"astbench {cell.name}")
        return _Job(cell, self._executor.submit(errand), time.monotonic())

    def _ended(self, one: _Job) -> Ended | None:
        if not one.job.done():
            return None
        error = one.job.exception()
        if error is None:
            return Ended(one.cell, *one.job.result())
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = f"job {one.job.job_id} was lost: {lines[-1] if lines else type(error).__name__}"
        return Ended(one.cell, 1, time.monotonic() - one.began, said)

    def _stop(self, running: Sequence[_Job]) -> list[Ended]:
        for one in running:
            one.job.cancel(check=False)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not all(one.job.done(force_check=True) for one in running):
            time.sleep(1)
        spent = [time.monotonic() - one.began for one in running]
        return [Ended(one.cell, -15, seconds, "cancelled") for one, seconds in zip(running, spent, strict=True)]
