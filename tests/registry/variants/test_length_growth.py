"""What claims to grow linearly with the length does: measured, with the default options."""

import math
import statistics
import time

import pytest
import torch

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.table import BUILTIN

LENGTHS = (2048, 4096, 8192, 16384)
LINEAR, QUADRATIC = 1.35, 1.6  # exponents: the most that a linear claim may show, the least that dense must
HEADS, DIM, WIDTH = 2, 32, 64


def claims_linear_time(name):
    """No product of lengths and no power of one in its `complexity`."""
    return not any(term in BUILTIN[name].config.complexity for term in ("N M", "N^", "sqrt", "N / ", ")^"))


def seconds(name, length):
    """Median of three forward calls, in processor time, so that a busy machine does not count."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=g) for _ in range(3))
    context = AttentionContext(hidden_states=torch.randn(1, length, WIDTH, generator=g))
    shape = AttentionShape(HEADS, HEADS, DIM, hidden_size=WIDTH, max_positions=max(LENGTHS))
    module = build_attention(name, {}, shape).eval()
    mask = AttentionMask(module.config.can.patterns[0])
    times = []
    for _ in range(4):
        start = time.process_time()
        module(q, k, v, mask, context=context)
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def exponent(times):
    """Slope of the least-squares line through log time over log length."""
    return statistics.linear_regression([math.log(n) for n in LENGTHS], [math.log(t) for t in times]).slope


@pytest.mark.slow
def test_time_grows_as_claimed():
    names = ["dense", *(name for name in BUILTIN if claims_linear_time(name))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            found = {name: [seconds(name, length) for length in LENGTHS] for name in names}
    finally:
        torch.set_num_threads(threads)
    growth = {name: exponent(times) for name, times in found.items()}
    print(f"\n{'forward, ms':14}" + "".join(f"{n:>9}" for n in LENGTHS) + "  exponent")
    for name, times in found.items():
        print(f"{name:14}" + "".join(f"{1000 * t:9.1f}" for t in times) + f"{growth[name]:10.2f}")
    assert growth.pop("dense") > QUADRATIC, "else this measures nothing"
    faster = {name: round(value, 2) for name, value in growth.items() if value >= LINEAR}
    assert not faster, f"time grows faster than claimed: exponents {faster}"
