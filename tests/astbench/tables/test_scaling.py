"""Exponents of growth, from runs whose growth is known."""

import math
import random

import pytest
from scipy import stats

from astbench.tables.pages.scaling import tables
from astbench.tables.records import Entry, Group, Run
from astbench.tables.student import slope

SIZES = {"llama-tiny": 1_000_000, "llama-mini": 4_000_000, "llama-small": 9_000_000}


def run(folder, attention, backbone, context, seed=0, noise=0.0):
    """Time a token grows as length^0.5 and parameters^0.8, memory as length^1.5, loss as parameters^-0.1."""
    size = SIZES[backbone]
    tokens = 2048
    record = {
        "config": {
            "attention": {"name": attention},
            "task": {"name": "wikitext103"},
            "backbone": {"name": backbone},
            "data": {"context": context, "batch_size": tokens // context},
            "seed_everything": seed,
        },
        "seed": seed,
        "metrics": {"nll": 20 * size**-0.1, "perplexity": 300.0},
        "parameters": {"total": size},
        "peak_memory": {"cpu_bytes": int(1e3 * context**1.5), "kind": "rss"},
        "train": {"step_ms": [0.0, 1e-6 * context**0.5 * size**0.8 * (1 + noise), 0.0]},
        "density": {"mean": 0.5},
    }
    name = f"{attention}-{backbone}-{context}-{seed}"
    return Run("g", name, folder / name, record, Entry("0"))


def group(*runs):
    return Group("g", "scaling", "Title", "", (), (), {}, tuple(runs), {})


def test_growth_that_is_known(tmp_path):
    runs = [run(tmp_path, a, b, n) for a in ("local", "dense") for b in SIZES for n in (256, 512, 1024)]
    held, growth = tables(group(*runs), {})
    assert [row.cells[0] for row in growth.rows] == ["`dense`", "`local`"]
    wanted = ("9", "+0.50 (+0.50 to +0.50)", "+1.50 (+1.50 to +1.50)", "-0.10 (-0.10 to -0.10)")
    assert growth.rows[0].cells[1:5] == wanted and growth.rows[0].cells[5] == "+0.80 (+0.80 to +0.80)"
    assert len(growth.rows[0].runs) == 9
    assert [row.cells[0] for row in held.rows[:2]] == ["`dense`"] * 2
    assert [row.cells[2] for row in held.rows[:2]] == ["256", "512"] and held.rows[0].cells[1].startswith(
        "llama-tiny, "
    )
    assert len(held.rows) == 18


def test_noise_widens_the_interval_and_seeds_are_averaged(tmp_path):
    draw = random.Random(1)
    runs = [
        run(tmp_path, "dense", b, n, s, math.exp(draw.gauss(0, 0.2)) - 1)
        for b in SIZES
        for n in (256, 1024)
        for s in (0, 1)
    ]
    held, growth = tables(group(*runs), {})
    middle, low, _, high = growth.rows[0].cells[2].replace("(", "").replace(")", "").split()
    assert float(low) < float(middle) < float(high) and float(high) - float(low) > 0.1
    assert held.caption == "The runs, means over 2 seeds" and len(held.rows) == 6


def test_too_little_to_fit(tmp_path):
    lone = tables(group(run(tmp_path, "dense", "llama-tiny", 256)), {})[1].rows[0].cells
    assert lone[2:] == ("-",) * 4
    two = tables(group(*(run(tmp_path, "dense", "llama-tiny", n) for n in (256, 512))), {})[1].rows[0].cells
    assert two[2:] == ("+0.50", "+1.50", "-", "-")


def test_one_group_is_a_plain_regression():
    draw = random.Random(3)
    x = [draw.random() for _ in range(9)]
    y = [2 * a + draw.gauss(0, 0.2) for a in x]
    fitted = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 7) * fitted.stderr
    found = slope([("one", a, b) for a, b in zip(x, y, strict=True)])
    assert found == pytest.approx((fitted.slope, fitted.slope - half, fitted.slope + half))


def test_intercepts_of_groups_do_not_matter():
    points = [(name, x, 3 * x + start) for name, start in (("a", 0.0), ("b", 100.0)) for x in (0.0, 1.0, 2.0)]
    assert slope(points) == pytest.approx((3.0, 3.0, 3.0))
