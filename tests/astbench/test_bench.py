"""`astbench bench`: what is measured, what is left out and why, and what the words say of the numbers."""

import csv
import io
import json

import pytest

from astbench.bench import layers, worker
from astbench.bench.config import BenchConfig
from astbench.errors import ConfigError

SMALL = ["--lengths=[64]", "--heads=2", "--head_dim=8", "--rounds=1", "--repeats=2"]

DENSE = layers.Entry("dense", "dense", {})

LEAKY = '''
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import scaled_dot_product_attention

from astbench_registry import Attention, AttentionConfig, AttentionOutput, Capabilities, register_attention


@dataclass(frozen=True)
class LeakyConfig(AttentionConfig):
    """Sees the future."""

    capabilities: ClassVar = Capabilities(patterns=("causal_self",), gqa=False, padding=False)


@register_attention("leaky", LeakyConfig)
class Leaky(Attention):
    def forward(self, q, k, v, mask, *, scale=None, context=None):
        return AttentionOutput(scaled_dot_product_attention(q, k, v, scale=scale))
'''


def cells(seconds):
    """Cells of forward calls from {attention: {length: seconds}}."""
    return [
        {"attention": name, "length": n, "forward": {"seconds": [s], "peak_bytes": 100 * n}}
        for name, points in seconds.items()
        for n, s in points.items()
    ]


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_exponent_of_a_power_law(power):
    points = {n: 3e-6 * n**power for n in (2048, 4096, 16384)}
    assert layers.exponent({**points, 512: 1.0}) == pytest.approx(power)
    assert layers.exponent({n: points[n] for n in (2048, 4096)}) is None


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({512: 2, 1024: 3, 2048: 9}, "slower than dense at every length up to 2,048"),
        ({512: 2, 1024: 1, 2048: 1}, "faster than dense from 1,024 on"),
        ({512: 0.1, 1024: 0.1, 2048: 1}, "faster than dense at every length"),
        ({512: 0.1, 1024: 9, 2048: 1}, "faster than dense at 512, 2,048 only"),
        ({}, "not measured"),
    ],
)
def test_the_verdict_against_dense(own, words):
    found = cells({"dense": {512: 1, 1024: 2, 2048: 4}, "other": own})
    assert layers.against_dense(found, "other", "forward") == words


def test_r_the_share_of_choosing_and_the_crossover():
    found = cells({"dense": {512: 1.0, 1024: 4.0, 4096: 64.0}, "ast 0.25": {512: 2.0, 1024: 2.0, 4096: 32.0}})
    for cell in found[3:]:
        cell |= {"density": 0.25, "kernel": {"seconds": [cell["forward"]["seconds"][0] * 0.75], "peak_bytes": 0}}
    assert layers.ratio(found, "ast 0.25", "forward") == {512: 8.0, 1024: 2.0, 4096: 2.0}
    assert layers.ratio(found, "ast 0.25", "kernel") == {512: 6.0, 1024: 1.5, 4096: 1.5}
    assert layers.ratio(found, "dense", "forward") == {}
    assert layers.choosing(found, "ast 0.25", "forward") == {512: 0.25, 1024: 0.25, 4096: 0.25}
    # At 512 twice as slow, at 1,024 twice as fast: equal half way in log-log.
    assert layers.crossover(found, "ast 0.25", "forward") == pytest.approx(512 * 2**0.5)
    assert layers.crossover(found, "dense", "forward") is None


def test_attentions_that_take_a_density_are_measured_at_each(astbench, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "red", lambda *_: "")
    folder = tmp_path / "bench"
    options = "--options={random_topk: {min_blocks: 1, block_size: 8, query_group: 8}}"
    words = ["--lengths=[128]", "--densities=[0.5,0.25]", options]
    done = astbench("bench", "--attention=random_topk", *SMALL, *words, f"--run_dir={folder}")
    assert done.code == 0, done.err
    record = json.loads((folder / "record.json").read_text())
    assert {c["attention"] for c in record["cells"]} == {"dense", "random_topk 0.5", "random_topk 0.25"}
    for cell in record["cells"]:
        assert ("kernel_training" in cell) == ("density" in cell) == cell["attention"].startswith("random")
    densities = {c["attention"]: c["density"] for c in record["cells"] if "density" in c}
    assert densities["random_topk 0.25"] < densities["random_topk 0.5"] < 1
    assert "R kernel+back" in done.out and "choosing forward" in done.out


def test_long_cells_are_left_out_by_the_length_before(monkeypatch):
    def slow(config, entry, length):
        found = {"seconds": [length**2 / 1e6], "peak_bytes": 0}
        return {"forward": found, "training": found}

    monkeypatch.setattr(layers, "_run", slow)
    config = BenchConfig(lengths=[1000, 2000, 4000], max_seconds=5, rounds=1)
    found = layers.measure(config, [DENSE], lambda line: None)
    assert [layers.summary(c, "forward").get("median") for c in found] == [1.0, 4.0, None]
    assert layers.summary(found[2], "forward")["why"] == "a call would take about 16 s (--max_seconds)"


def test_what_fails_once_is_not_tried_at_longer_lengths(monkeypatch):
    tried = []

    def dying(config, entry, length):
        tried.append(length)
        return {"died": "out of memory"}

    monkeypatch.setattr(layers, "_run", dying)
    layers.measure(BenchConfig(lengths=[10, 20], rounds=2), [DENSE], lambda line: None)
    assert tried == [10]


def test_torchs_long_words_for_no_memory():
    assert worker.refusal(RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefault...")) == "out of memory"
    assert worker.refusal(ValueError("needs a\n mask")) == "needs a mask"


def test_peak_memory_is_what_a_call_takes():
    import torch

    size = 64 * 2**20
    found = worker.clock(lambda: torch.ones(size // 4)[:1].clone(), repeats=2)
    assert 0.9 * size < found["peak_bytes"] < 1.3 * size
    assert len(found["seconds"]) == 2


def test_a_bench_leaves_record_table_and_picture(astbench, tmp_path):
    folder = tmp_path / "bench"
    done = astbench("bench", "--attention=local", *SMALL, "--rounds=2", f"--run_dir={folder}")
    assert done.code == 0, done.err
    record = json.loads((folder / "record.json").read_text())
    assert record["state"] == "done" and record["hardware"]["threads"] == 1
    assert {(c["attention"], c["length"]) for c in record["cells"]} == {
        (name, length) for name in ("dense", "local") for length in (64,)
    }
    for cell in record["cells"]:
        for mode in layers.MODES:
            assert len(cell[mode]["seconds"]) == 4 and min(cell[mode]["seconds"]) > 0
        assert cell["flops"] > 0 and cell["state_size"] > 0
    assert {c["backend"] for c in record["cells"]} == {"sdpa-cpu"}
    assert len(list(csv.DictReader(io.StringIO((folder / "cells.csv").read_text())))) == 2 * 2
    assert (folder / "curves.svg").read_text().startswith("<?xml")
    assert "against dense" in done.out and "growth" in done.out


def test_what_fails_conformance_is_not_timed(astbench, plugin_file, tmp_path):
    plugin = plugin_file(code=LEAKY)
    words = [*SMALL, "--pattern=causal_self", f"--plugins=[{plugin}]", f"--run_dir={tmp_path / 'bench'}"]
    done = astbench("bench", "--attention=leaky", *words)
    assert done.code == 1
    assert "leaky: conformance: " in done.out
    record = json.loads((tmp_path / "bench" / "record.json").read_text())
    assert {c["attention"] for c in record["cells"]} == {"dense"}
    assert "causality" in record["red"]["leaky"] or "interface" in record["red"]["leaky"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--lengthz=3"], "lengthz"),
        (["--heads=x"], "heads"),
        (["--heads=0"], "--heads must be above 0, got 0"),
        (["--lengths=[0]"], "--lengths must be positive whole numbers"),
        (["--kv_heads=3"], "--kv_heads must divide --heads=8, got 3"),
        (["--dtype=int8"], "--dtype must be one of"),
        (["--densities=[0]"], "--densities must be above 0 and at most 1"),
        (["--attention=local", "--options={ast: {}}"], "--options speaks of ast"),
        (["--attention=local", "--options={local: {window: 0}}"], "--attention.window must be at least 1 key"),
    ],
)
def test_bad_options_are_one_line(astbench, tmp_path, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    done = astbench("bench", *words)
    assert done.code == 2 and error in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_pattern_must_be_self_attention():
    with pytest.raises(ConfigError, match="--pattern must be"):
        BenchConfig(pattern="causal_cross")
