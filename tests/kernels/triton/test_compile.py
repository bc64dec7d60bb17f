"""What the compiler makes of the shipped kernels: no spills, matrix instructions, shared memory that fits.

Compiled ahead of time for GPUs that need not be here, in a process of its own, since this one may interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from astbench_kernels.triton import has_gluon

pytest.importorskip("triton", reason="triton is not installed")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
ATTENTION = ("query_major.forward", "query_major.backward", "key_major.forward", "key_major.backward", "decode.forward")
HOPPER = ("hopper.forward", "hopper.backward_q", "hopper.backward_kv")
SPILLED = {"hopper.backward_q": 64, "hopper.backward_kv": 160}
"""Bytes, with a bias or a causal mask: no fewer than in the prototype, which reached its speed with them."""
CHOICE = ("choose.choose_in_registers", "choose.choose_through_scratch", "carried.score_rows")


def report(arch, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "astbench_kernels.triton.report", f"--arch={arch}", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {arch}
    return rows


def check(rows):
    """Everything that is wrong with the kernels, at once."""
    problems = []
    for row in rows:
        where = {name: row[name] for name in ("kernel", "arch", "rows", "keys", "num_warps")} | row["call"]
        if row["shared"] > SHARED_LIMIT[row["arch"]]:
            problems.append(f"{row['shared']} bytes of shared memory: {where}")
        if (row["spilled"] or 0) > SPILLED.get(row["kernel"], 0):
            problems.append(f"{row['spilled']} bytes spilled: {where}")
        if row["kernel"] in ATTENTION:
            # The sum over keys of the key-major backward pass has the keys, all others the query rows, on the side
            # that a wgmma takes 64 of. Float32 goes in three passes of tf32.
            side = row["keys"] if row["kernel"] == "key_major.backward" else row["rows"]
            large = row["arch"] >= 90 and side >= 64 and row["call"]["dtype"] != "float32"
            if not row["wgmma" if large else "mma"]:
                problems.append(f"no {'wgmma' if large else 'mma.sync'}: {where}")
        if row["kernel"] in HOPPER and not row["wgmma"]:
            problems.append(f"no wgmma: {where}")
        if row["kernel"] in HOPPER and row["serialised"]:
            problems.append(f"asynchronous products are serialised: {where}")
        if row["kernel"] in CHOICE and not row["wgmma"] + row["mma"]:
            problems.append(f"no matrix instruction: {where}")
    assert not problems, "\n".join(problems)
    if any(row["spilled"] is None for row in rows):
        pytest.skip("spills are not known: this triton ships no cuobjdump; the rest holds")


@pytest.mark.parametrize("arch", [80, 90])
def test_short_set(arch):
    rows = report(arch)
    # Every schedule, both directions, the kernels that make the lists ready, the one that merges split lists, and
    # those that choose.
    others = {"lists._order", "lists._count", "lists._scatter", "decode.merge", "pool.pool"}
    others |= {"carried.find_thresholds", "carried.list_blocks"}
    if arch == 90 and has_gluon():
        others |= {*HOPPER, "hopper.rowsums"}
    assert {*ATTENTION, *CHOICE} | others <= {row["kernel"] for row in rows}
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_every_shipped_configuration(arch):
    check(report(arch, "--all"))


@pytest.mark.parametrize("kernel", ["query_major.forward", "hopper.forward", "hopper.backward_kv"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spilled": 168}, "168 bytes spilled"), ({"shared": 2**18}, "shared memory"), ({"wgmma": 0}, "no wgmma"),
        ({"serialised": True}, "serialised"),
    ],
)  # fmt: skip
def test_gate_can_fail(kernel, change, problem):
    row = {"kernel": kernel, "arch": 90, "rows": 64, "keys": 64, "num_warps": 4, "spilled": 0, "serialised": False}
    row |= {"shared": 2**16, "wgmma": 8, "mma": 0, "call": {"dtype": "float16"}}
    check([row])
    if "serialised" in change and kernel not in HOPPER:
        return
    with pytest.raises(AssertionError, match=problem):
        check([row | change])
