"""One measured cell in a process of its own: `python -m astbench.bench.worker`, a cell as JSON on standard input.

A process a cell, because peak memory is a process's, and so that one that runs out of it takes none along.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from astbench_kernels import BlockLayout, block_sparse_attention
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention, load_plugin
from astbench_registry.interface import AttentionStats

LONG_CALL = 5.0
"""Seconds; a first call that takes longer is itself counted, since a warm-up would change little."""


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory of one layer, forward alone and forward with backward.

    Args:
        cell: attention, options, pattern, batch, heads, kv_heads, head_dim, length, dtype, repeats, seed.

    Returns: `forward` and `training`, each with `seconds` (a list) and `peak_bytes` above what was there before; for
        attentions that choose key blocks also `kernel` and `kernel_training`, the same without the choice; `flops`
        as declared, `parameters`, `backend`, and `density`, the share of the visible pairs that was computed.
        Training runs in training mode, the attention's own losses included. A mode that fails holds `error` instead.
    """
    torch.manual_seed(cell["seed"])
    dtype = getattr(torch, cell["dtype"])
    batch, heads, kv_heads, dim, length = (cell[x] for x in ("batch", "heads", "kv_heads", "head_dim", "length"))
    shape = AttentionShape(heads, kv_heads, dim, hidden_size=heads * dim, max_positions=length)
    module = build_attention(cell["attention"], cell["options"], shape).to(dtype)
    mask = AttentionMask(cell["pattern"])

    def inputs(n: int) -> tuple[list[Tensor], Tensor]:
        q, k, v = (torch.randn(batch, h, n, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
        return [q, k, v], torch.randn(batch, n, heads * dim, dtype=dtype)

    def run(n: int, training: bool) -> Callable[[], Tensor]:
        tensors, hidden = inputs(n)
        context = AttentionContext(hidden_states=hidden)
        grad = torch.randn_like(tensors[0])

        def forward() -> Tensor:
            with torch.no_grad():
                return module(*tensors, mask, context=context).context

        def forward_backward() -> Tensor:
            for x in (*tensors, *module.parameters()):
                x.grad = None
            out = module(*tensors, mask, context=context)
            total = (out.context * grad).sum() + sum(out.losses.values())
            total.backward()
            gradient = tensors[0].grad
            return out.context.detach() if gradient is None else gradient

        if training:
            for x in tensors:
                x.requires_grad_()
        return forward_backward if training else forward

    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "flops": module.flops(batch, length, length, mask),
        "state_size": module.state_size(length),
    }
    layout = None
    try:
        found |= what_runs(module, inputs(min(length, 64)), mask)
        if module.config.can.yields_layout:
            tensors, hidden = inputs(length)
            stats = statistics(module, tensors, hidden, mask)
            assert stats is not None
            found["density"] = float(stats.density.mean())
            found["backend"] = stats.backend  # schedules differ between lengths
            layout = stats.layout
    except (RuntimeError, MemoryError) as error:
        return {**found, "forward": {"error": refusal(error)}}
    for mode, training in (("forward", False), ("training", True)):
        module.train(training)
        run(min(length, 64), training)()  # what is loaded and compiled at the first call
        try:
            found[mode] = clock(run(length, training), cell["repeats"])
        except (RuntimeError, MemoryError, ValueError) as error:
            found[mode] = {"error": refusal(error)}
            return found  # training needs more of everything
    if layout is not None:
        backend = cell["options"].get("backend", "auto")
        for mode, training in (("kernel", False), ("kernel_training", True)):
            found[mode] = clock(kernel(inputs(length)[0], layout, mask, backend, training), cell["repeats"])
    return found


def kernel(
    tensors: list[Tensor], layout: BlockLayout, mask: AttentionMask, backend: str, training: bool
) -> Callable[[], Tensor]:
    """A call of the block-sparse kernel on given lists."""
    q, k, v = (x.requires_grad_(training) for x in tensors)
    grad = torch.randn_like(q)

    def call() -> Tensor:
        with torch.set_grad_enabled(training):
            out, _ = block_sparse_attention(q, k, v, layout, causal=mask.causal, backend=backend)
        return torch.autograd.grad(out, (q, k, v), grad)[0] if training else out

    return call


def what_runs(module: nn.Module, sample: tuple[list[Tensor], Tensor], mask: AttentionMask) -> dict[str, str]:
    """The backend, by the statistics of a small call."""
    stats = statistics(module, *sample, mask)
    return {"backend": stats.backend if stats is not None else ""}


@torch.no_grad()
def statistics(module: nn.Module, tensors: list[Tensor], hidden: Tensor, mask: AttentionMask) -> AttentionStats | None:
    """What the attention says of a call."""
    context = AttentionContext(listen=True, hidden_states=hidden)
    stats: AttentionStats | None = module.eval()(*tensors, mask, context=context).stats
    return stats


def clock(call: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Seconds of each call after the first, and the first one's peak memory above the level before it."""
    before = reset_peak()
    start = time.perf_counter()
    out = call()
    first = time.perf_counter() - start
    peak = max(0, memory("VmHWM") - before)
    if not bool(out.isfinite().all()):
        return {"error": "the output is not finite"}
    del out
    if first > LONG_CALL:
        return {"seconds": [first], "peak_bytes": peak}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak_bytes": peak}


def reset_peak() -> int:
    """Forget the peak so far; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def refusal(error: BaseException) -> str:
    """One line; what torch says when memory is short is long."""
    text = " ".join(str(error).split())
    short = isinstance(error, MemoryError) or "alloc" in text or "memory" in text
    return "out of memory" if short else text[:200]


def main() -> None:
    """Read a cell, print its measurement as one line of JSON."""
    cell = json.loads(sys.stdin.read())
    torch.set_num_threads(cell["threads"])
    for plugin in cell["plugins"]:
        load_plugin(plugin)
    limit = int(cell["max_memory_gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(measure(cell)))


if __name__ == "__main__":
    main()
