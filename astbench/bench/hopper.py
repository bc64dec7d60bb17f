"""The Hopper kernels on a device: every kind of call against float64, then times beside the other Triton kernels.

The first step of `make gpu`, alone `python -m astbench.bench.hopper`. Compiling takes most of the time, so that
processes share out the cases, and what is to be timed; the times are taken by one process, when the others are done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astbench.bench.clocks import clock
from astbench.bench.gates import wrong as gate
from astbench.bench.hopper_cases import CASES, errors, wrong
from astbench.bench.lists import TRAINING
from astbench_kernels import BlockLayout, block_sparse_attention, dense_attention, dense_backends
from astbench_kernels.dispatch.hopper import TIMED
from astbench_kernels.triton import hopper_device_refusals

BACKENDS = ("triton_hopper", "triton_plain")
TOKENS, HEADS = 32_768, 16
ROUNDS, REPEATS = 2, 4


@dataclass(frozen=True)
class Shape:
    """What is timed: random lists of equal length over TOKENS tokens and HEADS heads, bfloat16."""

    rows: int
    block: int
    dim: int
    density: float = 1 / 8
    causal: bool = False
    carried: bool = False

    @property
    def name(self) -> str:
        """In words."""
        mask = ", carried" if self.carried else ", causal" if self.causal else ""
        return f"{self.rows} x {self.block}, heads of {self.dim}, 1/{1 / self.density:.0f}{mask}"


SHAPES = (
    *(Shape(*key) for key in TIMED),
    *(Shape(rows, 64, 128, 1 / 16) for rows in (128, 64)),
    *(Shape(rows, 64, 128, causal=True) for rows in (128, 64)),
    *(Shape(rows, 64, 128, 1 / 4, causal=True, carried=True) for rows in (128, 64)),
)


def step(seconds: float) -> dict[str, Any]:
    """Checks and times, in so many seconds: what `make gpu` writes down.

    Returns: `state`, "passed" when every case is right, and every call that is timed, and no more than that; `cases`,
        the errors of each or what went wrong; `gates`, what is wrong with the calls that are timed; `times`, a row a
        shape and mode.
    """
    there = torch.cuda.is_available()
    if reasons := hopper_device_refusals("cuda") if there else ["a CUDA device is needed, and torch finds none"]:
        return {"state": "not run", "why": "; ".join(reasons), "cases": {}, "times": []}
    end = time.monotonic() + seconds
    shares = max(1, min(16, os.cpu_count() or 1))
    found: dict[str, dict[str, Any]] = {name: {"wrong": ["not finished"]} for name in (*CASES, *_names())}
    lines = _run([["check", f"--share={n}", f"--of={shares}"] for n in range(shares)], end)
    died = [line["died"] for line in lines if "died" in line]
    found |= {line["case"]: line for line in lines if "case" in line}
    cases = {name: found[name] for name in CASES}
    gates = {name: found[name]["wrong"] for name in _names()}
    right = [shape.name for shape in SHAPES if not any(gates[f"{shape.name}, {name}"] for name in BACKENDS)]
    lines = _run([["time", *(f"--only={name}" for name in right)]], end) if right else []
    times, died = [line for line in lines if "shape" in line], died + [line["died"] for line in lines if "died" in line]
    bad = [name for name, case in cases.items() if case["wrong"]]
    bad += [name for name, wrong in gates.items() if wrong and name.endswith(BACKENDS[0])]
    state = f"failed: {', '.join(bad)}" if bad else "passed"
    return {"state": state, "cases": cases, "gates": gates, "times": times, "died": died}


def _names() -> list[str]:
    return [f"{shape.name}, {backend}" for shape in SHAPES for backend in BACKENDS]


def _run(calls: list[list[str]], end: float) -> list[dict[str, Any]]:
    """The lines of JSON of processes that run side by side until `end`; what is printed by then counts.

    A process that ends badly, or is stopped, leaves a line `died` too, with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, words in enumerate(calls):
            command = [sys.executable, "-m", "astbench.bench.hopper", *words]
            with open(f"{folder}/{number}", "w") as log, open(f"{folder}/{number}.errors", "w") as errors_log:
                started.append(subprocess.Popen(command, stdout=log, stderr=errors_log))
        for process in started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        lines: list[dict[str, Any]] = []
        for number, process in enumerate(started):
            text = Path(folder, str(number)).read_text(encoding="utf-8", errors="replace")
            lines += [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
            if process.returncode:
                words = Path(folder, f"{number}.errors").read_text(encoding="utf-8", errors="replace").splitlines()
                lines.append({"died": " ".join([*calls[number], "ended with", str(process.returncode), *words[-1:]])})
    return lines


def check(share: int, of: int) -> None:
    """Print what is wrong with each case of a share, and with each call that is to be timed."""
    attend = partial(block_sparse_attention, backend="triton_hopper")
    todo: dict[str, Callable[[], dict[str, Any]]] = {name: partial(_case, name, attend) for name in CASES}
    for shape in SHAPES:
        for backend in BACKENDS:
            todo[f"{shape.name}, {backend}"] = partial(_gate, shape, backend)
    for name, call in list(todo.items())[share::of]:
        try:
            found = call()
        except Exception as error:  # whatever a case ends with, the others are still to be run
            found = {"wrong": [_said(error)]}
        print(json.dumps({"case": name, **found}), flush=True)


def _case(name: str, attend: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Any]:
    found = errors(CASES[name], attend, "cuda")
    return {"wrong": wrong(CASES[name], found), "errors": found}


def _gate(shape: Shape, backend: str) -> dict[str, Any]:
    tensors, layout = inputs(shape, "cuda")
    said = gate(_attend(shape, layout, backend), tensors, layout, causal=shape.causal, training=True)
    return {"wrong": [said] if said else []}


def inputs(shape: Shape, device: str, tokens: int = TOKENS) -> tuple[tuple[Tensor, Tensor, Tensor], BlockLayout]:
    """q, k, v, and lists that are as long for each group as its keys allow, their own blocks among them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, shape.dim, generator=g).to(device, torch.bfloat16) for _ in range(3))
    groups, blocks = tokens // shape.rows, tokens // shape.block
    scores = torch.rand(1, HEADS, groups, blocks, generator=g)
    start, end = torch.arange(blocks) * shape.block, (torch.arange(groups)[:, None] + 1) * shape.rows
    visible = start < end if shape.causal else torch.ones(groups, blocks, dtype=torch.bool)
    own = visible & (start >= end - shape.rows)
    scores = scores.masked_fill(~visible, -1.0).masked_fill(own & shape.causal, 2.0)
    wanted = (visible.sum(-1) * shape.density).round().clamp(min=1).maximum((own & shape.causal).sum(-1))
    keep = scores.argsort(dim=-1, descending=True).argsort(dim=-1) < wanted[:, None]
    sizes = {"block_size": shape.block, "query_group": shape.rows, "query_length": tokens, "key_length": tokens}
    layout = BlockLayout.from_mask(keep.to(device), **sizes)
    if shape.carried:  # half of the blocks are seen from the group's first row on
        since = torch.randint(-shape.rows, shape.rows, layout.indices.shape, generator=g, dtype=torch.int32)
        layout = BlockLayout(layout.indices, layout.counts, **sizes, since=since.clamp(min=0).to(device))
    return (q, k, v), layout


def _attend(shape: Shape, layout: BlockLayout, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: block_sparse_attention(q, k, v, layout, causal=shape.causal, backend=backend)[0]


def measure(only: list[str]) -> None:
    """Print a row for each of these shapes and each mode."""
    for shape in (shape for shape in SHAPES if shape.name in only):
        tensors, layout = inputs(shape, "cuda")
        pairs = float(layout.attended_pairs(causal=shape.causal).sum())
        visible = HEADS * TOKENS * ((TOKENS + 1) / 2 if shape.causal else TOKENS)
        # A carried list computes whole tiles, so its R against pairs says little.
        tiles, most = layout.tiles(causal=shape.causal)
        share = float(tiles.sum()) / (most * HEADS) if shape.carried else pairs / visible
        for training in (False, True):
            calls = {name: _attend(shape, layout, name) for name in BACKENDS}
            calls |= {f"dense {name}": partial(_dense, shape.causal, name) for name in _dense_names()}
            milliseconds, failed = _interleaved(calls, tensors, training=training)
            dense = min((ms for name, ms in milliseconds.items() if name.startswith("dense")), default=None)
            row: dict[str, Any] = {**asdict(shape), "shape": shape.name, "training": training, "dense_ms": dense}
            for name in BACKENDS:
                row[f"{name}_ms"] = ms = milliseconds.get(name)
                row[f"{name}_R"] = None if dense is None or ms is None else ms / (share * dense)
                work = pairs * 4 * shape.dim * (TRAINING if training else 1)
                row[f"{name}_tflops"] = None if ms is None else work / ms / 1e9
            row |= {"share": share, "failed": failed}
            print(json.dumps(row), flush=True)


def _dense_names() -> list[str]:
    fast = ("sdpa_cudnn", "sdpa_flash", "flash_attn")
    return [name for name in fast if not dense_backends()[name].device_refusals("cuda")]


def _dense(causal: bool, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense_attention(q, k, v, causal=causal, backend=backend)


def _interleaved(
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]],
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    training: bool,
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each call that runs, in another order every round; what the other sparse ones end with.

    A dense kernel need not serve every call, so those are left out without a word.
    """
    leaves = [x.detach().requires_grad_(training) for x in tensors]
    grad = torch.randn_like(leaves[0])
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    order = random.Random(0)

    def once(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(training):
            out = attend(*leaves)
        return torch.autograd.grad(out, leaves, grad)[0] if training else out

    for _ in range(ROUNDS):
        for name in order.sample(sorted(calls), len(calls)):
            try:
                seconds.setdefault(name, []).extend(clock(partial(once, calls[name]), REPEATS, "cuda")["seconds"])
            except (RuntimeError, ValueError, ImportError, KeyError) as error:
                if name in BACKENDS:
                    failed[name] = _said(error)
    known = {name: 1000 * statistics.median(each) for name, each in seconds.items() if each and name not in failed}
    return known, failed


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def markdown(found: dict[str, Any]) -> list[str]:
    """Lines of the summary."""
    state = found["state"] + (f": {found['why']}" if "why" in found else "")
    lines = ["", f"Hopper kernels: {state}. Cases: {len(found.get('cases', []))}, against float64.", ""]
    lines += [f"- {words}" for words in found.get("died", [])]
    lines += [f"- {name}: {wrong}; not timed" for name, each in found.get("gates", {}).items() for wrong in each]
    for row in found.get("times", []):
        lines += [f"- {row['shape']}, {_mode(row)}, {name}: {words}" for name, words in row.get("failed", {}).items()]
    if not found.get("times"):
        return lines
    lines += [
        "",
        "| rows x keys, 32,768 tokens | mode | hopper, ms | R | plain, ms | R | faster |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in found["times"]:
        figures = [
            f"{row[f'{name}_{what}']:.3g}" if row[f"{name}_{what}"] else "-"
            for name in BACKENDS
            for what in ("ms", "R")
        ]
        known = [(row[f"{name}_ms"], name) for name in BACKENDS if row[f"{name}_ms"]]
        faster = min(known)[1].removeprefix("triton_") if len(known) == 2 else "-"
        lines.append(f"| {row['shape']} | {_mode(row)} | {' | '.join(figures)} | {faster} |")
    return lines


def _mode(row: dict[str, Any]) -> str:
    return "with backward" if row["training"] else "forward"


def main(words: list[str] | None = None) -> int:
    """Without a word both steps; `check` and `time` are what its processes run."""
    parser = argparse.ArgumentParser(prog="python -m astbench.bench.hopper")
    parser.add_argument("what", nargs="?", choices=("check", "time"))
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything")
    given = parser.parse_args(words)
    if given.what == "check":
        check(given.share, given.of)
    elif given.what == "time":
        measure(given.only or [shape.name for shape in SHAPES])
    else:
        found = step(given.seconds)
        print("\n".join([*markdown(found), *(f"{name}: {case['wrong']}" for name, case in found["cases"].items())]))
        return 0 if found["state"] == "passed" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
