"""The dispatch table against what runs, and its measured figures against the records that they name."""

import json
from pathlib import Path

import pytest
import torch

from astbench.bench.analysis import ratio
from astbench_kernels import BlockLayout, choose_backend, what_runs
from astbench_kernels.dispatch import TABLE, Shapes, explain, hopper, rules
from astbench_kernels.dispatch.measured import EFFICIENCIES
from astbench_kernels.triton.plan import make_plan

ROOT = Path(__file__).parents[2]


def shapes(**changes):
    given = {"device": "cpu", "dtype": "float32", "batch": 2, "heads": 6, "kv_heads": 3, "list_heads": 6, "head_dim": 8}
    given |= {"query_length": 96, "key_length": 96, "block_size": 16, "query_group": 1, "density": 0.5, "causal": False}
    return Shapes(**given | changes)


def tensors(call):
    """q, k, v and a layout of these shapes, the first blocks listed everywhere."""
    groups = -(-call.query_length // call.query_group)
    blocks = -(-call.key_length // call.block_size)
    keep = torch.zeros(call.batch, call.list_heads, groups, blocks, dtype=torch.bool)
    keep[..., : round(call.density * blocks)] = True
    if call.causal:
        keep &= torch.arange(blocks) * call.block_size <= (torch.arange(groups) * call.query_group)[:, None]
    layout = BlockLayout.from_mask(
        keep,
        block_size=call.block_size,
        query_group=call.query_group,
        query_length=call.query_length,
        key_length=call.key_length,
    )
    dtype = getattr(torch, call.dtype)
    q = torch.zeros(call.batch, call.heads, call.query_length, call.head_dim, dtype=dtype)
    k = torch.zeros(call.batch, call.kv_heads, call.key_length, call.head_dim, dtype=dtype)
    return q, k, k, layout


def learning(**changes):
    return shapes(gradients=True, **changes)


LONG = {"query_length": 960, "key_length": 960, "density": 0.25}

CALLS = {
    "a list a token, forward": (shapes(**LONG), "gather (masked)"),
    "a list a token, forward, large blocks": (
        shapes(query_length=4096, key_length=4096, density=1 / 16, block_size=64, causal=True),
        "gather (key-major)",
    ),
    "tiles, forward": (shapes(query_group=64, block_size=64, **LONG), "gather (query-major)"),
    "most of the tiles, forward": (shapes(query_group=64, block_size=64, **LONG | {"density": 0.9}), "gather (masked)"),
    "a list a token": (learning(**LONG), "gather (key-major)"),
    "a list a token, half of them": (learning(**LONG | {"density": 0.5}), "gather (masked)"),
    "a list a token, short": (learning(), "gather (masked)"),
    "most pairs under a mask": (learning(query_length=1024, key_length=1024, density=1.0), "gather (masked)"),
    "most pairs, larger blocks": (
        learning(query_length=1024, key_length=1024, density=1.0, block_size=128),
        "gather (key-major)",
    ),
    "blocks of 4": (
        learning(query_length=8192, key_length=8192, density=0.125, block_size=4, causal=True),
        "gather (masked)",
    ),
    "blocks of 4, few of them": (
        learning(query_length=8192, key_length=8192, density=0.03125, block_size=4, causal=True),
        "gather (key-major)",
    ),
    "shared by two heads": (learning(query_group=4, list_heads=3, density=0.25), "gather (query-major)"),
    "shared by two heads, most": (learning(query_group=4, list_heads=3, density=5 / 6), "gather (masked)"),
    "one list for all heads": (learning(query_group=3, list_heads=1, **LONG), "gather (key-major)"),
    "half as many rows as keys": (learning(query_group=8, **LONG), "gather (query-major)"),
    "one row less": (learning(query_group=7, **LONG), "gather (key-major)"),
    "a decoding step": (shapes(query_length=1, key_length=960, density=0.25), "gather (one-row)"),
    "a decoding step, all keys": (shapes(query_length=1, density=1.0), "gather (whole-row)"),
    "8 tokens decoded, all keys": (learning(query_length=8, density=1.0), "gather (masked)"),
    "few rows meet a block, short": (
        learning(query_length=64, key_length=64, block_size=4, density=0.125),
        "gather (masked)",
    ),
    "a block meets 16 rows": (learning(query_length=160, key_length=1600, density=0.05), "gather (key-major)"),
    "a block meets 15 rows": (learning(query_length=300, key_length=1600, density=0.025), "gather (query-major)"),
}


@pytest.mark.parametrize(("call", "runs"), CALLS.values(), ids=CALLS)
def test_what_is_explained_is_what_runs(call, runs):
    q, k, v, layout = tensors(call)
    backend = choose_backend("auto", q.device, dtype=q.dtype, head_dim=call.head_dim, layout=layout)
    q.requires_grad_(call.gradients)
    assert what_runs(backend, q, k, v, layout, causal=call.causal) == runs
    assert explain(call).row.runs == runs


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [256, 257])
@pytest.mark.parametrize(("group", "lists"), [(1, 6), (8, 3), (7, 3), (16, 6), (15, 6)])
def test_the_same_on_cuda(monkeypatch, group, lists, head_dim, dtype):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton", reason="triton is not installed")
    call = shapes(device="cuda", dtype=dtype, head_dim=head_dim, query_group=group, list_heads=lists)
    q, k, v, layout = tensors(call)
    row = explain(call).row
    backend = choose_backend("auto", torch.device("cuda"), dtype=q.dtype, head_dim=head_dim, layout=layout)
    assert row.backend == backend == ("triton" if dtype != "float64" and head_dim == 256 else "gather")
    if backend == "gather":
        q.requires_grad_()  # these tensors are on a CPU, where without gradients torch's fused kernel would be asked
    assert row.runs == what_runs(backend, q, k, v, layout, causal=False)
    if backend == "triton":
        assert row.schedule == make_plan(q, k, v, layout, causal=False, gradients=False).schedule


def hopper_shapes(**changes):
    given = {"device": "cuda", "dtype": "bfloat16", "head_dim": 128, "block_size": 64, "query_group": 128}
    given |= {"capability": 90, "query_length": 32768, "key_length": 32768, "list_heads": 6}
    return shapes(**given | changes)


@pytest.mark.parametrize("ran", [True, False])
def test_hopper_is_explained_where_a_plan_takes_it(monkeypatch, ran):
    monkeypatch.setattr("astbench_kernels.triton.plan._on_cuda", lambda device: True)
    monkeypatch.setattr(hopper, "RAN_ON_A_DEVICE", ran)
    for change in ({}, {"block_size": 48}, {"head_dim": 96}, {"query_group": 32}, {"dtype": "float32"}):
        call = hopper_shapes(query_length=4096, key_length=4096, **change)
        q, k, v, layout = tensors(call)
        assert explain(call).row.schedule == make_plan(q, k, v, layout, causal=False, gradients=False).schedule
    assert explain(hopper_shapes()).row.runs == ("triton (hopper)" if ran else "triton (query-major)")
    assert explain(hopper_shapes(capability=80)).row.runs == "triton (query-major)"


def test_every_row_can_decide(monkeypatch):
    monkeypatch.setattr(hopper, "RAN_ON_A_DEVICE", True)
    calls = [call for call, _ in CALLS.values()]
    for group, length in ((1, 5), (1, 1000), (16, 1000)):
        calls.append(shapes(device="cuda", query_group=group, query_length=length, key_length=1000))
    calls.append(hopper_shapes())
    assert {id(explain(call).row) for call in calls} == {id(row) for row in TABLE}


@pytest.mark.parametrize(("queries", "keys", "stride"), [(96, 96, 1), (512, 4096, 1), (4096, 512, 1), (4096, 512, 8)])
def test_keys_seen_are_those_of_the_mask(queries, keys, stride):
    for offset in (0, keys * stride - queries):
        position = torch.arange(queries) + offset
        exact = ((position + 1).div(stride, rounding_mode="floor").clamp(0, keys)).double().mean()
        found = rules.keys_seen(queries, keys, offset, causal=True, key_stride=stride)
        assert found == pytest.approx(float(exact), abs=1)


def test_rows_met_is_what_the_lists_say():
    """Under a causal mask a row sees half of the blocks on average."""
    for causal, expected in ((False, 0.5 * 96 * 2), (True, 0.5 * 96 * 2 * 3.5 / 6)):
        assert shapes(causal=causal).rows_met == pytest.approx(expected)


@pytest.mark.parametrize("record", sorted({m.record for m in EFFICIENCIES}))
def test_measured_figures_are_the_records(record):
    found = json.loads((ROOT / record).read_text())
    config, cells = found["config"], found["cells"]
    mine = [m for m in EFFICIENCIES if m.record == record]
    kinds = {(m.dtype, m.head_dim, m.block_size, m.causal) for m in mine}
    causal = config["pattern"] == "causal_self"
    assert kinds == {(config["dtype"], config["head_dim"], config["options"]["ast"]["block_size"], causal)}
    measured = {}
    for name in {c["attention"] for c in cells} - {"dense"}:
        columns = [ratio(cells, name, mode) for mode in ("kernel", "kernel_training", "forward", "training")]
        for cell in (c for c in cells if c["attention"] == name):
            n = cell["length"]
            # Two densities asked for may come to one that was kept; the first one asked for is quoted.
            measured.setdefault((n, round(cell["kernel"]["density"], 3)), []).append(
                tuple(round(column[n], 2) for column in columns)
            )
    for m in mine:
        near = [
            v for (n, d), values in measured.items() if n == m.tokens and abs(d - m.density) < 0.002 for v in values
        ]
        assert (m.forward, m.training, m.layer_forward, m.layer_training) in near, m


def test_nothing_is_quoted_far_from_what_was_measured():
    close = shapes(
        heads=4,
        kv_heads=4,
        list_heads=4,
        head_dim=64,
        block_size=64,
        query_group=64,
        query_length=8192,
        key_length=8192,
    )
    for density, tokens, forward in ((0.125, 8192, 1.64), (0.0625, 8192, 1.56), (0.1, 30000, 1.27)):
        call = Shapes(**vars(close) | {"density": density, "query_length": tokens, "key_length": tokens})
        assert explain(call).measured.forward == forward
    for change in (
        {"density": 0.5},
        {"query_length": 40000, "key_length": 40000},
        {"block_size": 32},
        {"head_dim": 128},
    ):
        found = explain(Shapes(**vars(close) | {"density": 0.125} | change))
        assert found.measured is None and found.missing


def test_thresholds_are_nowhere_else():
    names = [n for n in vars(rules) if n.isupper() and n not in ("TABLE", "EFFICIENCIES")]
    for path in (ROOT / "kernels").rglob("*.py"):
        if path.name != "rules.py":
            text = path.read_text()
            assert not [n for n in names if f"\n{n} = " in text], path
