"""Freed memory stays with the process, unless the environment says otherwise."""

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from astbench.cli import allocator

NAMES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")

needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@needs_glibc
def test_children_inherit_it():
    allocator.keep_freed_memory()
    assert [os.environ[name] for name in NAMES] == [str(2**31 - 1), str(2**25)]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_environment_says_stays(monkeypatch, name):
    monkeypatch.setenv(name, "4096")
    allocator.keep_freed_memory()
    assert {key: value for key, value in os.environ.items() if key in NAMES} == {name: "4096"}


def test_what_tunables_say_stays(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=4096")
    allocator.keep_freed_memory()
    assert not any(name in os.environ for name in NAMES)


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory()
    assert not any(name in os.environ for name in NAMES)


FAULTS = """
import ctypes, resource
from astbench.cli.allocator import keep_freed_memory
keep_freed_memory() if {kept} else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for turn in range(20):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [ctypes.c_void_p(libc.malloc(2**24)) for _ in range(4)]
    for piece in pieces:
        ctypes.memset(piece, 1, 2**24)
    for piece in pieces:
        libc.free(piece)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
@pytest.mark.skipif(resource.getpagesize() != 4096, reason="counts pages of 4 KB")
def test_a_piece_that_is_asked_for_again_is_still_there():
    """18 times 64 MB are 294,912 pages."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (True, False)
    )
    assert kept < 5000 < given_back
