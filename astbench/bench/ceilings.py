"""What the device can do at best, measured: `python -m astbench.bench.ceilings` prints it as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from astbench.bench.clocks import clock

COPY_BYTES = 2**30
L2_BYTES = 8 * 2**20
"""Of source and target each; together well inside the 50 MB of an H100."""
L2_COPIES = 64
"""In one graph: a copy alone is shorter than its launch."""
MATMUL = 8192


def ceilings() -> dict[str, float | str]:
    """Bandwidth of memory and of L2 (read plus written), and the rate of a large bfloat16 matmul."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "device": torch.cuda.get_device_name(),
        "copy_gbs": 2 * COPY_BYTES / _median(lambda: target.copy_(source)) / 1e9,
        "l2_gbs": 2 * L2_BYTES * L2_COPIES / _median(_copies_in_l2()) / 1e9,
        "matmul_bf16_tflops": 2 * MATMUL**3 / _median(lambda: a @ b) / 1e12,
    }


def _median(call: Callable[[], Tensor]) -> float:
    return statistics.median(clock(call, 20, "cuda")["seconds"])


def _copies_in_l2() -> Callable[[], Tensor]:
    source = torch.randn(L2_BYTES // 4, device="cuda")
    target = source.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(L2_COPIES):
            target.copy_(source)

    def call() -> Tensor:
        graph.replay()
        return target

    return call


if __name__ == "__main__":
    print(json.dumps(ceilings()))
