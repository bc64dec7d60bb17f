"""Where cells are measured: in other processes, which may die of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import IO, Any

from astbench.bench.analysis import Cell

ANSWER = "astbench-cell "
"""How the line of a result begins; whatever else a process prints is nobody's."""


def lost(error: str) -> bool:
    """After such an error a CUDA process can do nothing any more."""
    return "out of memory" not in error and ("CUDA error" in error or "device-side assert" in error)


class Worker:
    """Measures cells: on the CPU a process each, on CUDA one process as long as it lives."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, cell: Cell, seconds: float | None = None) -> dict[str, Any]:
        """What :func:`astbench.bench.worker.measure` finds; `died` when the process does, or takes too long."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds or 0, stop)
        if seconds is not None:
            timer.start()
        try:
            process.stdin.write(json.dumps(cell) + "\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith(ANSWER)), None)
        except BrokenPipeError:
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            why = f"stopped after {seconds:.0f} s (--time_limit)" if late.is_set() else self._last_words()
            self.close()
            return {"died": why}
        found: dict[str, Any] = json.loads(answer.removeprefix(ANSWER))
        errors = [value["error"] for value in found.values() if isinstance(value, dict) and "error" in value]
        if cell["device"] == "cpu" or any(map(lost, errors)):
            self.close()
        return found

    def close(self) -> None:
        """End the process; the next cell gets a new one."""
        if self._process is None or self._errors is None:
            return
        with suppress(BrokenPipeError), self._process:  # closes its pipes, and waits
            self._process.kill()
        self._errors.close()
        self._process = self._errors = None

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process lives)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "astbench.bench.worker"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self._process

    def _last_words(self) -> str:
        """Why the process ended, in one line."""
        assert self._process is not None and self._errors is not None
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"ended with {code}"
        short = code == -9 or "MemoryError" in last or "alloc" in last
        return "out of memory" if short else last[:200]
