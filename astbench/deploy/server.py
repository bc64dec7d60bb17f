"""A process of `astbench serve`: started as a user would, watched, and never left behind."""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from types import TracebackType

from astbench.errors import AstbenchError
from astbench.loadtest.resources import gpu_peak
from astbench.sweeps import local
from astbench.sweeps.launcher import last_words

START = 900.0
"""Seconds that a server has until it is ready."""

_LOOK = 0.1


class ServerFailed(AstbenchError):
    """A server that did not become ready, or is gone."""


class Server:
    """Context manager: within, it is ready.

    Args:
        words: What a user would type after `astbench`.
        log: What it prints goes behind what this file holds.
        key: That it asks for.

    Attributes:
        url: Where it listens.
    """

    def __init__(self, words: Sequence[str], log: Path, key: str = "") -> None:
        self._words, self._log, self._key = words, log, key
        self._process: Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        """Start it.

        Raises:
            ServerFailed: it ended, with the last words of its log, or was not ready in time.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        before = self._log.stat().st_size if self._log.exists() else 0
        self._process = local.start(self._words, self._log, dict(os.environ), local.CHILD)
        try:
            self._wait(before)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it, however this process goes on."""
        self.stop()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Ask it to end, and after some patience end it."""
        if self._process is not None:
            local.stop([self._process])

    def died(self) -> str:
        """Why it is gone; empty while it runs."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return ""
        if code < 0:
            full = ", which the system sends when memory is used up" if code == -9 else ""
            return f"the server was killed by signal {-code}{full}"
        return f"the server ended with {code}: {last_words(self._log) or 'its log is empty'}"

    def get(self, path: str) -> str:
        """What it answers.

        Raises:
            ServerFailed: nothing.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=60) as answer:
                return str(answer.read().decode())
        except (OSError, ValueError) as error:
            raise ServerFailed(
                self.died() or f"{path} gives no answer: {' '.join(str(error).split())[:200]}"
            ) from error

    def _wait(self, before: int) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end:
            if why := self.died():
                raise ServerFailed(why)
            said = self._log.read_bytes()[before:].decode(errors="replace")
            if found := re.search(r"^serving on (http://\S+)$", said, re.MULTILINE):
                self.url = found[1]
                try:
                    self.get("/ready")
                    return
                except ServerFailed:
                    pass
            time.sleep(_LOOK)
        raise ServerFailed(f"the server was not ready in {START:g} s; {self._log} says how far it came")


class Watch:
    """What a server takes while requests come: CPU seconds, and the most memory at a time. Linux's /proc tells.

    Args:
        server: Ready.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._proc = server, Path(f"/proc/{server.pid}")
        self._began, self._cpu = time.monotonic(), self._seconds()
        self._own = time.process_time()
        try:
            (self._proc / "clear_refs").write_text("5")  # the peak begins anew
            self._since = "load"
        except OSError:
            self._since = "start"

    def found(self) -> dict[str, float | int | str | None]:
        """Since it was made: seconds on the clock, CPU seconds of the server and of this process, cores busy, memory.

        `peak_resident_since` says whether the peak is that of the load, or of all the server's life. The peak on a GPU
        is always of all its life. None is what the system does not tell.
        """
        wall, cpu = time.monotonic() - self._began, self._seconds()
        spent = None if cpu is None or self._cpu is None else cpu - self._cpu
        return {
            "wall_seconds": round(wall, 3),
            "cpu_seconds": spent,
            "cores_busy": None if spent is None else round(spent / wall, 3),
            "client_cpu_seconds": round(time.process_time() - self._own, 3),
            "peak_resident_bytes": self._peak(),
            "peak_resident_since": self._since,
            "gpu_peak_bytes": gpu_peak(self._server.get("/metrics")),
        }

    def _seconds(self) -> float | None:
        try:
            behind = (self._proc / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(behind[11]) + int(behind[12])) / os.sysconf("SC_CLK_TCK")  # user and system time

    def _peak(self) -> int | None:
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB", (self._proc / "status").read_text(), re.MULTILINE)
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None
