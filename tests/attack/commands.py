"""Commands and functions in forked children of one process that has the imports behind it, within limits."""

import gc
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from tests.astbench.processes import PRELOADED

TASKS = ["lm", "lra", "mt", "qa", "recall"]
CODES = (0, 2, 3, 4, 5, 6, 7, 130, 143)
"""The documented exit codes but 1, which is `unexpected`."""

ROOM = 3 << 30
"""Bytes that a child may take beside what its parent has."""

SECONDS = 120
"""After so many a child is killed, and the trial does not hold."""

CUT_OFF = 97
"""Exit code of a child that a network was asked of."""


class Broken(Exception):
    """What was tried does not hold."""


def demand(condition, what):
    """The trial does not hold unless the condition does."""
    if not condition:
        raise Broken(what)


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (minus the signal), what it wrote, seconds, and its most bytes of memory."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int

    @property
    def last(self):
        """The last line of what it wrote."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return f"exit {self.code}: {lines[-1][:300] if lines else 'nothing said'}"

    def must_be_clear(self, *codes, what=""):
        """An exit code of these, or any documented one; one line of an error, or none after 0; no traceback."""
        said = f"{what}: {self.last}" if what else self.last
        demand(self.seconds < SECONDS, f"no end within {SECONDS} s; {said}")
        demand("Traceback (most recent call last)" not in self.out + self.err, f"a traceback; {said}")
        demand(self.code in (codes or CODES), said)
        errors = [line for line in self.err.splitlines() if line.startswith("astbench: error: ")]
        demand(len(errors) == (self.code != 0), f"{len(errors)} lines of errors; {said}")


def preload():
    """Import, once for all children, what commands import."""
    torch.set_num_threads(1)
    for name in (*PRELOADED, *(f"astbench.tasks.{task}.task" for task in TASKS)):
        import_module(name)
    gc.freeze()  # a collection in a child would copy the pages of all that


class Child:
    """A forked child that runs a function; what it wrote is read when it has ended."""

    def __init__(self, function, folder, *, cwd=None, env=None, limits=(), room=ROOM, redirect=None):
        self.files = [Path(folder) / f".{name}.txt" for name in ("out", "err")]
        self.began = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(function, cwd, env or {}, limits, room, redirect)

    def _run(self, function, cwd, env, limits, room, redirect):
        code = 99
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind itself ignores it
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, file in enumerate(self.files, start=1):
                os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666), stream)
            if redirect is not None:
                redirect()
            sys.stdout, sys.stderr = stream_of(1), stream_of(2)
            for name, value in env.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            if cwd is not None:
                os.chdir(cwd)
            stay_here()
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            for what, most in ((resource.RLIMIT_AS, own + room), (resource.RLIMIT_CORE, 0), *limits):
                resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
            code = function() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(BaseException):
                    stream.flush()
            os._exit(code)

    def send(self, number, *, group=False):
        """A signal to the child, or to its whole group."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def ended(self, seconds=SECONDS):
        """Wait for it, and for so long."""
        while True:
            done, status, usage = os.wait4(self.pid, os.WNOHANG)
            spent = time.monotonic() - self.began
            if done:
                break
            if spent > seconds:
                self.send(signal.SIGKILL, group=True)
            time.sleep(0.005)
        with suppress(ProcessLookupError):  # loader processes that a killed parent left, which hold its lock too
            for _ in range(400):
                os.killpg(self.pid, signal.SIGKILL)
                time.sleep(0.005)
        texts = [file.read_bytes()[:200_000].decode(errors="replace") if file.exists() else "" for file in self.files]
        code = os.waitstatus_to_exitcode(status)
        demand(code != CUT_OFF, f"it asks for a network: {texts[1].strip()[-200:]}")
        return Ended(code, *texts, spent, usage.ru_maxrss * 1024)


def stream_of(number):
    """A standard stream as Python opens it at its start; None where it is closed."""
    try:
        return open(number, "w", buffering=1, errors="backslashreplace")
    except OSError:
        return None


def stay_here():
    """End this process as soon as it asks for another machine."""

    def guarded(connect):
        def call(this, address):
            host = str(address[0]) if isinstance(address, tuple) else ""
            if this.family in (socket.AF_INET, socket.AF_INET6) and not re.match(r"127\.|::1$|localhost$", host):
                os.write(2, f"a connection to {address}\n".encode())
                os._exit(CUT_OFF)
            return connect(this, address)

        return call

    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


def begin(words, folder, *, before=None, **options):
    """`astbench WORDS` as a :class:`Child`; `before` is called first."""

    def function():
        if before is not None:
            before()
        from astbench.cli import main

        sys.argv = ["astbench"]
        return main([str(word) for word in words])

    return Child(function, folder, **options)


def run(words, folder, *, seconds=SECONDS, **options):
    """`astbench WORDS`, and how it ended."""
    return begin(words, folder, **options).ended(seconds)
