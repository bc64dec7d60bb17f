"""`astbench bench`: what is measured, what is left out and why, and what the words say of the numbers."""

import csv
import io
import json

import pytest
import torch

from astbench.bench import analysis, clocks, gates, layers, lists, processes, worker
from astbench.bench.config import BenchConfig
from astbench.errors import ConfigError
from astbench_kernels import BlockLayout, block_sparse_attention, dense_attention
from astbench_registry import AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call

SMALL = ["--lengths=[64]", "--heads=2", "--head_dim=8", "--rounds=1", "--repeats=2"]

DENSE = layers.Entry("dense", "dense", {})


class Fake:
    """A worker that measures nothing."""

    def __init__(self, measure):
        self.measure = measure


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
    assert analysis.exponent({**points, 512: 1.0}) == pytest.approx(power)
    assert analysis.exponent({n: points[n] for n in (2048, 4096)}) is None


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
    assert analysis.against_dense(found, "other", "forward") == words


def test_r_the_share_of_choosing_and_the_crossover():
    found = cells({"dense": {512: 1.0, 1024: 4.0, 4096: 64.0}, "ast 0.25": {512: 2.0, 1024: 2.0, 4096: 32.0}})
    for cell in found[3:]:
        cell |= {"density": 0.25, "kernel": {"seconds": [cell["forward"]["seconds"][0] * 0.75], "peak_bytes": 0}}
    assert analysis.ratio(found, "ast 0.25", "forward") == {512: 8.0, 1024: 2.0, 4096: 2.0}
    assert analysis.ratio(found, "ast 0.25", "kernel") == {512: 6.0, 1024: 1.5, 4096: 1.5}
    assert analysis.ratio(found, "dense", "forward") == {}
    assert analysis.choosing(found, "ast 0.25", "forward") == {512: 0.25, 1024: 0.25, 4096: 0.25}
    # At 512 twice as slow, at 1,024 twice as fast: equal half way in log-log.
    assert analysis.crossover(found, "ast 0.25", "forward") == pytest.approx(512 * 2**0.5)
    assert analysis.crossover(found, "dense", "forward") is None


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
        assert ("kernel_training" in cell) == cell["attention"].startswith("random")
    densities = {c["attention"]: c["forward"]["density"] for c in record["cells"]}
    assert densities["random_topk 0.25"] < densities["random_topk 0.5"] < 1
    for words in ("R = time", "TFLOP/s", "random_topk 0.5 kernel training  "):
        assert words in done.out


def test_long_cells_are_left_out_by_the_length_before():
    def slow(cell, seconds):
        found = {"seconds": [cell["length"] ** 2 / 1e6], "peak_bytes": 0}
        return {"forward": found, "training": found}

    config = BenchConfig(lengths=[1000, 2000, 4000], max_seconds=5, rounds=1)
    found = layers.measure(config, [DENSE], lambda line: None, Fake(slow))
    assert [analysis.summary(c, "forward").get("median") for c in found] == [1.0, 4.0, None]
    assert analysis.summary(found[2], "forward")["why"] == "a call would take about 16 s (--max_seconds)"


def test_what_fails_once_is_not_tried_at_longer_lengths():
    tried = []

    def dying(cell, seconds):
        tried.append(cell["length"])
        return {"died": "out of memory"}

    found = layers.measure(BenchConfig(lengths=[10, 20], rounds=2), [DENSE], lambda line: None, Fake(dying))
    assert tried == [10]
    assert analysis.summary(found[0], "forward")["why"] == "out of memory"
    assert analysis.summary(found[1], "training")["why"] == "not tried, it failed at 10 tokens"


def test_what_fails_in_one_mode_stays_failed_and_the_others_go_on():
    rounds = iter([{"error": "gate: off"}, {"seconds": [9.0], "peak_bytes": 0}])

    def half(cell, seconds):
        return {"forward": {"seconds": [1.0], "peak_bytes": 7 if cell["gate"] else 5}, "training": next(rounds)}

    (found,) = layers.measure(BenchConfig(lengths=[10], rounds=2), [DENSE], lambda line: None, Fake(half))
    assert found["forward"] == {"seconds": [1.0, 1.0], "peak_bytes": 7}
    assert analysis.summary(found, "training") == {"why": "gate: off"}


def test_after_the_time_limit_the_rest_is_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(layers.time, "monotonic", lambda: now[0])
    given = []

    def slow(cell, seconds):
        given.append(seconds)
        now[0] += 30
        return {"forward": {"seconds": [30.0], "peak_bytes": 0}, "training": {"seconds": [1.0], "peak_bytes": 0}}

    config = BenchConfig(lengths=[10, 11, 12], rounds=2, time_limit=50, max_seconds=100)
    found = layers.measure(config, [DENSE], lambda line: None, Fake(slow))
    assert given == [50, 20]
    assert analysis.summary(found[2], "forward")["why"] == "no time was left of 50 s (--time_limit)"


def test_torchs_long_words_for_no_memory():
    assert worker.refusal(RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefault...")) == "out of memory"
    assert worker.refusal(ValueError("needs a\n mask")) == "needs a mask"


def test_peak_memory_is_what_a_call_takes():
    size = 64 * 2**20
    found = clocks.clock(lambda: torch.ones(size // 4)[:1].clone(), repeats=2)
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
        for mode in ("forward", "training"):
            assert len(cell[mode]["seconds"]) == 4 and min(cell[mode]["seconds"]) > 0
        assert cell["flops"] > 0 and cell["state_size"] > 0
    assert {c["backend"] for c in record["cells"]} == {"sdpa-cpu"}
    assert len(list(csv.DictReader(io.StringIO((folder / "cells.csv").read_text())))) == 2 * 2
    assert (folder / "curves.svg").read_text().startswith("<?xml")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
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
        (["--device=tpu"], "--device must be one of cpu, cuda, got tpu"),
        (["--modes=prefill"], "--modes must be some of forward, training, decode, separated by commas, got 'prefill'"),
        (["--lists="], "--lists must be some of layer, random, uneven"),
        (["--time_limit=-1"], "--time_limit must be 0 (none) or more seconds"),
        (["--max_memory_gib=0"], "--max_memory_gib must be above 0"),
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


def test_without_a_cuda_device_cuda_is_refused_in_a_line(astbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = astbench("bench", "--device=cuda", "--attention=ast")
    assert done.code == 7 and "--device=cuda needs a CUDA device" in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_fastest_dense_row_is_what_others_are_compared_with():
    found = cells({"dense:a": {512: 1.0, 1024: 9.0}, "dense:b": {512: 2.0, 1024: 4.0}, "ast": {512: 1.5, 1024: 2.0}})
    assert analysis.best_dense(found, "forward") == {512: "dense:a", 1024: "dense:b"}
    assert analysis.speedup(found, "ast", "forward") == {512: 1 / 1.5, 1024: 2.0}
    for cell in found:
        cell["kernel@flex"] = {"seconds": [1.0], "peak_bytes": 0, "density": 0.5}
    assert analysis.ratio(found, "ast", "kernel@flex") == {512: 2.0, 1024: 0.5}
    assert analysis.memory(found, "ast", "forward") == {512: 1.0, 1024: 1.0}


def test_dense_on_cuda_is_every_kernel_that_runs_there(monkeypatch):
    said = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = BenchConfig(device="cuda", attention="ast", dtype="bfloat16", modes="decode", pattern="causal_self")
    found = layers.chosen(config, said.append)
    labels = [entry.label for entry in found]
    assert {"dense:sdpa_flash", "dense:sdpa_cudnn", "dense:sdpa_efficient", "ast"} <= set(labels)
    assert found[0].options == {"backend": "sdpa_flash"} and "dense:sdpa_math" not in labels
    assert found[-1].asked == ["decode", "kernel_decode"]
    for package in {"flash_attn", "xformers"} - {label.partition(":")[2] for label in labels}:
        assert any(f"dense:{package} left out: package {package} is not installed" in line for line in said)


def test_what_does_not_decode_or_has_no_lists_is_left_out():
    said = []
    config = BenchConfig(
        attention="ast,local,nystrom", lists="random", modes="decode,training", options={"ast": {"query_group": 4}}
    )
    found = layers.chosen(config, said.append)
    assert [(entry.label, entry.asked) for entry in found] == [
        ("dense", ["decode", "training"]),
        ("ast, random lists", ["kernel_training"]),
    ]
    assert "  ast, decode, left out: with these options it does not decode" in said
    assert "  local left out: it has none of --modes=decode,training with --lists=random" in said


def order(**changes):
    """A cell as the worker takes it."""
    entry = layers.Entry("ast", "ast", {"block_size": 8, "min_blocks": 1}, ("forward",), "layer")
    config = BenchConfig(heads=4, kv_heads=2, head_dim=8, repeats=2, batch=3)
    given = layers._order(config, entry, changes.pop("length", 40), gate=True)
    return {**given, **changes}


def test_decode_reads_a_cache_of_the_length_and_counts_what_it_must_move():
    asked = ["decode", "kernel_decode", "kernel_decode@reference"]
    found = worker.measure(
        order(modes=["decode"], asked=asked, peers=["reference"], pattern="causal_self", length=43,
              options={"block_size": 8, "min_blocks": 1, "top_k": 1, "query_group": 1})
    )  # fmt: skip
    for mode in asked:
        assert len(found[mode]["seconds"]) == 2, found
        # The first block and the last, of 3 keys, out of 43 keys; 3 sequences, 2 key heads, size 8, 4 bytes.
        assert found[mode]["density"] == pytest.approx((8 + 3) / 43)
        assert found[mode]["work_flops"] == 4 * 8 * 3 * 4 * (8 + 3)
        assert found[mode]["least_bytes"] == 4 * (2 * 3 * 4 * 8 + 2 * 3 * 2 * 8 * (8 + 3))


def test_the_work_of_dense_is_that_of_every_visible_pair():
    q, k = torch.zeros(3, 4, 10, 8), torch.zeros(3, 2, 10, 8)
    for pattern, pairs in (("bidirectional_self", 100), ("causal_self", 55)):
        found = lists.work("training", q, k, lists.every_block(q, k, 0), AttentionMask(pattern))
        assert found["density"] == 1 and found["work_flops"] == 3.5 * 4 * 8 * 3 * 4 * pairs
        assert found["least_bytes"] == 4 * 6 * (q.numel() + k.numel())


@pytest.mark.parametrize("uneven", [False, True])
def test_random_lists_keep_the_budget_and_what_is_always_kept(uneven):
    torch.manual_seed(3)
    options = {"block_size": 4, "query_group": 2, "density": 0.5, "min_blocks": 1}
    module = build_attention("ast", options, AttentionShape(3, 3, 8))
    x = torch.zeros(2, 3, 62, 8)
    call = Call.of(module.shape, x, x, x, AttentionMask("causal_self"))
    layout = lists.random_lists(module.selector, call, uneven=uneven)
    keep = layout.to_mask()
    assert keep[..., 0].all(), "the first block"
    own = torch.arange(31) * 2 // 4
    assert keep.gather(-1, own.expand(2, 3, 31)[..., None]).all(), "the group's own block"
    assert not (keep & (torch.arange(16) > own[:, None])).any(), "the future"
    even = torch.ceil((own + 1) * 0.5).clamp(min=2).minimum(own + 1)
    assert (layout.counts == even).all() != uneven
    assert 0.7 * even.sum() <= layout.counts.sum() / 6 <= 1.3 * even.sum()
    assert (keep[0, 0] != keep[1, 2]).any()


def call_and_layout(pattern="causal_self", dtype=torch.float32):
    """A right call of the kernel, grouped heads, short last block, and what it runs on."""
    torch.manual_seed(7)
    q, k, v = (torch.randn(2, h, 45, 8, dtype=dtype) for h in (4, 2, 2))
    layout = BlockLayout.from_mask(
        torch.rand(2, 4, 9, 6) < 0.6, block_size=8, query_group=5, query_length=45, key_length=45
    )
    causal = pattern == "causal_self"

    def attend(q, k, v, layout=layout):
        return block_sparse_attention(q, k, v, layout, causal=causal)[0]

    return attend, (q, k, v), layout, causal


@pytest.mark.parametrize("pattern", ["bidirectional_self", "causal_self"])
@pytest.mark.parametrize("training", [False, True])
def test_the_gate_lets_a_right_call_through(pattern, training):
    attend, tensors, layout, causal = call_and_layout(pattern)
    assert gates.wrong(attend, tensors, layout, causal=causal, training=training) == ""

    def dense(q, k, v):
        return dense_attention(q, k, v, causal=causal)

    every = lists.every_block(*tensors[:2], 0)
    assert gates.wrong(dense, tensors, every, causal=causal, training=training) == ""


WRONG = {
    "scaled": lambda out, q, k, v: out * 1.001,
    "nan": lambda out, q, k, v: out / (out != out[0, 0, 0, 0]),
    "last row": lambda out, q, k, v: torch.cat([out[:, :, :-1], out[:, :, :1]], 2),
    "a head": lambda out, q, k, v: out.roll(1, 1),
    "gradient of q": lambda out, q, k, v: out + (q - q.detach()) * 0.01,
    "gradient of k": lambda out, q, k, v: out + (k - k.detach()).sum() * 0.01,
    "gradient of v": lambda out, q, k, v: out + (v - v.detach()).sum() * 0.01,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_the_gate_stops_a_wrong_call(change):
    attend, tensors, layout, causal = call_and_layout()

    def other(q, k, v):
        return change(attend(q, k, v), q, k, v)

    assert "off the reference" in gates.wrong(other, tensors, layout, causal=causal, training=True)


def test_the_gate_stops_a_call_on_other_lists():
    attend, tensors, layout, causal = call_and_layout()
    other = BlockLayout.from_mask(
        layout.to_mask().roll(1, 1), block_size=8, query_group=5, query_length=45, key_length=45
    )
    assert "output" in gates.wrong(attend, tensors, other, causal=causal, training=False)


def test_where_the_gate_is_red_there_is_no_number(monkeypatch):
    monkeypatch.setattr(worker, "wrong", lambda *_, training, **__: "gate: off" if training else "")
    entry = layers.Entry("ast", "ast", {"block_size": 8}, ("forward", "training"), "layer")
    found = worker.measure(order(modes=list(entry.modes), asked=entry.asked))
    for mode in ("training", "kernel_training"):
        assert found[mode] == {"error": "gate: off"}
    for mode in ("forward", "kernel"):
        assert len(found[mode]["seconds"]) == 2
    cell = {"attention": "ast", "length": 40, "asked": entry.asked, **found}
    assert [row["why"] for row in analysis.rows([cell])] == ["", "gate: off", "", "gate: off"]
    assert [row["median"] for row in analysis.rows([cell])][1::2] == ["", ""]


def test_a_peer_that_refuses_is_a_reason_beside_the_kernels_numbers():
    found = worker.measure(order(asked=["forward", "kernel", "kernel@nothing"], peers=["nothing"]))
    assert "unknown backend 'nothing'" in found["kernel@nothing"]["error"]
    assert found["kernel"]["seconds"] and found["forward"]["seconds"]


def test_a_process_that_dies_or_hangs_says_so_and_the_next_one_works(tmp_path):
    plugin = tmp_path / "dying.py"
    plugin.write_text("import sys, time\nprint('noise')\ntime.sleep(60) if 'hang' in __file__ else sys.exit('so long')")
    hanging = tmp_path / "hang.py"
    hanging.write_text("import time\ntime.sleep(60)")
    with processes.Worker() as one:
        assert one.measure(order(plugins=[str(plugin)]))["died"].endswith("so long")
        assert one.measure(order(plugins=[str(hanging)]), 1)["died"] == "stopped after 1 s (--time_limit)"
        assert one.measure(order())["forward"]["seconds"]


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA out of memory. Tried to allocate 20 GiB", False),
        ("CUDA error: out of memory", False),
    ],
)
def test_after_which_errors_a_cuda_process_is_given_up(text, is_lost):
    assert processes.lost(text) is is_lost
    assert (worker.refusal(RuntimeError(text)) == "out of memory") is not is_lost


def test_cuda_calls_are_timed_by_events_after_a_warm_up_with_a_flush_each(monkeypatch):
    trace = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            trace.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, stop):
            return 4.0

    class Flush:
        def zero_(self):
            trace.append("flush")

    monkeypatch.setattr(clocks.torch, "empty", lambda *_, **__: Flush())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: trace.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 130)

    def call():
        trace.append("call")
        return torch.ones(3)

    assert clocks.clock(call, 2, "cuda") == {"seconds": [0.004, 0.004], "peak_bytes": 30}
    timed = ["flush", "event", "call", "event"]
    assert trace == ["call", "reset", *timed, "call", *timed, *timed]
    assert trace.count("call") == clocks.WARM_UP + 2


@pytest.mark.parametrize("text", ["trainer: {}", "attentions: local", "trainer: &a {<<: *a}"])
def test_a_config_with_options_of_something_else_is_refused(astbench, tmp_path, text):
    """A group without options is nothing to the parser, and all attentions would be measured."""
    (tmp_path / "c.yaml").write_text(text)
    outcome = astbench("bench", f"--config={tmp_path / 'c.yaml'}", f"--run_dir={tmp_path / 'run'}")
    assert outcome.code == 2 and "astbench bench has no option" in outcome.err, outcome.err
