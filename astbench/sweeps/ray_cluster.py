"""Cells as tasks of a Ray cluster, or of this machine; a task whose worker is lost is tried again."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError
from astbench.sweeps.launcher import PATIENCE, Ended, Launcher
from astbench.sweeps.remote import Errand, Outcome
from astbench.sweeps.spec import Cell

RETRIES = 3
"""How often a cell goes on after its worker was lost."""

ANSWERS_WITHIN = 10
"""Seconds in which a cluster that is named has to take a connection. Ray itself waits for over twenty minutes."""

_OF_CLUSTER = ("address", "object_store_memory", "include_dashboard")


@dataclass
class _Task:
    cell: Cell
    reference: Any
    began: float


def _reach(address: Any) -> None:
    """Raise OSError where `host:port` is named and nobody listens; other addresses are Ray's to look up."""
    host, colon, port = str(address).rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"no cluster answers at {address} (ray: {{address: ...}}): {error}") from error


def _do(errand: Errand) -> Outcome:
    return errand()


class RayCluster(Launcher):
    """See the base class.

    Args:
        jobs: Most tasks at a time.
        logs: Folder for what cells print.
        options: `address`, `object_store_memory` and `include_dashboard` go to `ray.init`, the rest to every task's
            `options` (`num_cpus`, `num_gpus`, `memory`, `max_retries`, ...).
        plugins: Code that every cell loads.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or it takes no such option.
    """

    def __init__(self, jobs: int, logs: Path, options: Mapping[str, Any], plugins: Sequence[str]) -> None:
        super().__init__(jobs, logs)
        try:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of its own default
            import ray
        except ImportError as error:
            raise ConfigError("--launcher=ray needs ray: pip install 'astbench[ray]'") from error
        self._ray = ray
        of_cluster = {key: value for key, value in options.items() if key in _OF_CLUSTER}
        of_task = {key: value for key, value in options.items() if key not in _OF_CLUSTER}
        try:
            if not ray.is_initialized():
                _reach(of_cluster.get("address"))
                listening = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
                ray.init(**{"log_to_driver": False, "include_dashboard": False, **of_cluster})
                for number, handler in listening.items():  # Ray's own would abort on a SIGTERM
                    signal.signal(number, handler)
            self._task = ray.remote(_do).options(**{"num_cpus": 1, "max_retries": RETRIES, **of_task})
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"--launcher=ray: {' '.join(str(error).split())}") from error
        self._plugins = tuple(plugins)

    def _start(self, cell: Cell, words: list[str]) -> _Task:
        errand = Errand(cell, self._plugins, (self._logs / f"{cell.name}.log").absolute(), Path.cwd())
        return _Task(cell, self._task.remote(errand), time.monotonic())

    def _ended(self, one: _Task) -> Ended | None:
        if not self._ray.wait([one.reference], timeout=0)[0]:
            return None
        try:
            return Ended(one.cell, *self._ray.get(one.reference))
        except self._ray.exceptions.RayTaskError as error:  # the worker lives; what it did raised
            return Ended(one.cell, 1, time.monotonic() - one.began, str(error).strip().splitlines()[-1])
        except self._ray.exceptions.RayError as error:
            said = f"its worker was lost: {str(error).strip().splitlines()[0]}"
            return Ended(one.cell, 1, time.monotonic() - one.began, said)

    def _stop(self, running: Sequence[_Task]) -> list[Ended]:
        """A cancelled task is interrupted where it waits, and stops its cell."""
        for one in running:
            self._ray.cancel(one.reference, force=False)
        if running:
            self._ray.wait([one.reference for one in running], num_returns=len(running), timeout=PATIENCE)
        now = time.monotonic()
        return [Ended(one.cell, -15, now - one.began, "cancelled") for one in running]
