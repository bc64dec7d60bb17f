"""The Triton kernels against the float64 oracle: on a GPU compiled, without one in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from astbench_kernels import BlockLayout, block_sparse_attention, choose_backend
from astbench_kernels import triton as package
from tests.kernels.conftest import DEVICE
from tests.oracles import TOLERANCE, relative_error

triton = pytest.importorskip("triton", reason="triton is not installed")

# The interpreter of triton 3.6 reads loop bounds in a way that numpy deprecated and 2.4 forbids.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("interpreter"),
]
if DEVICE == "cpu" and (triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"):
    pytest.skip("the interpreter of this triton needs numpy below 2.4", allow_module_level=True)


@dataclass(frozen=True)
class Case:
    queries: int = 63
    keys: int = 63
    block: int = 16
    group: int = 16
    offset: int = 0
    causal: bool = True
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    lists: int = 4
    dim: int = 16
    value_dim: int = 16
    padding: str = "none"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    schedule: str | None = None
    keep: float = 0.5
    stride: int = 1
    carried: bool = False


def make(case, seed=0):
    """(q, k, v, bias), layout, key_valid: the inputs in the dtype of the case."""
    g = torch.Generator().manual_seed(seed)
    groups = (case.offset + case.queries - 1) // case.group - case.offset // case.group + 1
    keep = torch.rand(case.batch, case.lists, groups, -(-case.keys // case.block), generator=g) < case.keep
    keep[0, 0, 0] = False  # rows that see nothing, and lists of all lengths
    keep[-1, -1, -1] = True
    layout = BlockLayout.from_mask(
        keep, block_size=case.block, query_group=case.group, query_length=case.queries, key_length=case.keys,
        query_offset=case.offset, key_stride=case.stride,
    )  # fmt: skip
    # Blocks in any order: nothing may rest on ascending ones.
    shuffled = torch.rand(layout.indices.shape, generator=g).masked_fill(~layout.slots, 2.0).argsort(-1)
    layout = replace(layout, indices=layout.indices.gather(-1, shuffled))
    q = torch.randn(case.batch, case.heads, case.queries, case.dim, generator=g)
    k = torch.randn(case.batch, case.kv_heads, case.keys, case.dim, generator=g)
    v = torch.randn(case.batch, case.kv_heads, case.keys, case.value_dim, generator=g)
    bias = torch.randn(layout.indices.shape, generator=g)
    if case.carried:
        since = torch.randint(-case.group // 2, case.group + 1, layout.indices.shape, generator=g, dtype=torch.int32)
        layout = replace(layout, since=since.clamp(min=0))
    valid = {
        "none": lambda: None,
        "tail": lambda: torch.arange(case.keys) < torch.tensor([[case.keys - 5], [case.keys // 2]])[: case.batch],
        "holes": lambda: torch.rand(case.batch, case.keys, generator=g) < 0.8,
    }[case.padding]()
    inputs = [x.to(DEVICE, case.dtype) for x in (q, k, v, bias)]
    since = None if layout.since is None else layout.since.to(DEVICE)
    layout = replace(layout, indices=layout.indices.to(DEVICE), counts=layout.counts.to(DEVICE), since=since)
    return inputs, layout, None if valid is None else valid.to(DEVICE)


def results(case, inputs, layout, valid, *, backend="triton"):
    """out, lse, and the gradients of a sum over both, by name."""
    from astbench_kernels.triton import triton_attention

    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v, bias = leaves
    options = {"block_bias": bias if case.bias else None, "causal": case.causal, "key_valid": valid}
    if backend == "triton" and case.schedule is not None:
        out, lse = triton_attention(q, k, v, layout, scale=case.dim**-0.5, schedule=case.schedule, **options)
    else:
        out, lse = block_sparse_attention(q, k, v, layout, backend=backend, **options)
    seen = lse > -torch.inf
    g = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, generator=g).to(DEVICE)).sum()
    loss = loss + (lse.double().masked_fill(~seen, 0) * torch.randn(lse.shape, generator=g).to(DEVICE)).sum()
    wanted = leaves if case.bias else leaves[:3]
    found = dict(zip(("dq", "dk", "dv", "dbias"), torch.autograd.grad(loss, wanted), strict=False))
    return {"out": out.detach(), "lse": lse.detach(), **found}


def compare(case, backend="triton"):
    inputs, layout, valid = make(case)
    got = results(case, inputs, layout, valid, backend=backend)
    expected = results(case, [x.double() for x in inputs], layout, valid, backend="reference")
    assert got["out"].dtype == case.dtype and got["lse"].dtype == torch.float32
    assert torch.equal(got["lse"] == -torch.inf, expected["lse"] == -torch.inf)
    empty = expected["lse"] == -torch.inf
    assert (got["out"][empty] == 0).all()
    errors = {}
    for name, value in got.items():
        a, b = value.double(), expected[name]
        if name == "lse":
            a, b = a.masked_fill(empty, 0), b.masked_fill(empty, 0)
        errors[name] = relative_error(a, b)
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[case.dtype]}
    assert not wrong, wrong


CASES = {
    "one-token": Case(1, 1, 16, 16, lists=1, keep=1.0),
    "per-token-63": Case(63, 63, 16, 1),
    "per-token-gqa-lists": Case(31, 31, 8, 1, lists=2, padding="tail", batch=2),
    "groups-of-4": Case(127, 127, 32, 4, lists=2),
    "groups-of-8-one-list": Case(41, 41, 16, 8, lists=1),
    "groups-of-64-127": Case(127, 127, 64, 64, lists=2),
    "groups-of-64-padded": Case(127, 127, 32, 64, padding="tail", batch=2, lists=1),
    "holes-in-the-keys": Case(37, 37, 16, 16, padding="holes"),
    "tile-split": Case(150, 150, 32, 150, lists=2, keep=0.8),
    "uneven-block": Case(65, 65, 48, 16),
    "tiny-blocks": Case(29, 29, 4, 16, lists=1, padding="tail"),
    "wide-block-query-major": Case(19, 300, 128, 16, causal=False, lists=1, value_dim=24),
    "wide-block-key-major": Case(5, 300, 128, 1, offset=290, value_dim=24),
    "cross-101x73": Case(101, 73, 8, 32, causal=False, lists=2, dim=24, value_dim=40),
    "cross-per-token": Case(13, 73, 16, 1, causal=False, dim=24, value_dim=40, padding="tail"),
    "decode": Case(1, 97, 16, 1, offset=96, keep=0.8, batch=2, lists=2),
    "chunk-from-mid-group": Case(11, 97, 16, 4, offset=85, lists=2),
    "more-queries-than-keys": Case(40, 23, 16, 8, causal=True),
    "no-bias": Case(37, 37, 16, 16, bias=False),
    "no-bias-per-token": Case(37, 37, 16, 1, bias=False),
    "head-96": Case(33, 33, 16, 16, dim=96, value_dim=96),
    "head-128-per-token": Case(17, 17, 16, 1, dim=128, value_dim=128),
    "float16": Case(63, 63, 16, 16, dtype=torch.float16),
    "float16-per-token": Case(31, 31, 16, 1, dtype=torch.float16, padding="tail"),
    "bfloat16": Case(63, 63, 16, 16, dtype=torch.bfloat16, schedule="query_major"),
    "bfloat16-per-token": Case(31, 31, 16, 1, dtype=torch.bfloat16, schedule="key_major"),
    "stride-4-per-token": Case(63, 15, 8, 1, stride=4, lists=2),
    "stride-4-groups-of-16": Case(67, 17, 4, 16, stride=4, padding="holes"),
    "stride-2-groups-of-64": Case(75, 37, 16, 64, stride=2, lists=1, batch=2, padding="tail"),
    "stride-7-chunk-from-mid-group": Case(11, 15, 4, 4, offset=92, stride=7, lists=2, keep=0.8),
    "stride-4-decode": Case(1, 23, 8, 1, offset=90, stride=4, keep=0.8, batch=2, lists=2),
    "stride-4-bidirectional": Case(29, 8, 4, 16, stride=4, causal=False),
    "groups-of-64-key-major": Case(67, 67, 16, 64, schedule="key_major"),
    "per-token-query-major": Case(13, 13, 8, 1, schedule="query_major", lists=2),
    "carried-groups-of-16": Case(67, 67, 16, 16, carried=True, lists=2, padding="holes"),
    "carried-groups-of-64": Case(127, 127, 64, 64, carried=True, lists=2, bias=False),
    "carried-groups-of-4-tiny-blocks": Case(29, 29, 4, 4, carried=True, lists=1),
    "carried-chunk-from-mid-group": Case(11, 97, 16, 16, carried=True, offset=85, lists=2, keep=0.8),
    "carried-stride-4": Case(67, 17, 4, 16, carried=True, stride=4),
    "carried-bidirectional": Case(29, 45, 8, 16, carried=True, causal=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients(case):
    compare(case)


def test_key_major_in_chunks(monkeypatch):
    from astbench_kernels.dispatch import rules
    from astbench_kernels.triton import plan

    case = Case(31, 31, 16, 2)
    monkeypatch.setattr(rules, "PARTIAL_BYTES", 5000)
    inputs, layout, _ = make(case)
    chunks = plan.make_plan(*inputs[:3], layout, causal=True).num_chunks
    assert 2 < chunks < layout.num_groups
    compare(case)


def test_deterministic_algorithms_repeat_bitwise():
    case = Case(13, 13, 8, 4, lists=2)
    torch.use_deterministic_algorithms(True)
    try:
        compare(case)
        first, second = (results(case, *make(case)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("group", [1, 16])
def test_padding_may_hold_nan(group):
    case = Case(33, 33, 8, group, padding="holes")
    (q, k, v, bias), layout, valid = make(case)
    clean = results(case, (q, k, v, bias), layout, valid)
    hole = ~valid[:, None, :, None]
    poisoned = results(case, (q, k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan), bias), layout, valid)
    for name in ("out", "lse"):
        assert torch.equal(poisoned[name], clean[name])
    for name in ("dq", "dk", "dv", "dbias"):
        assert poisoned[name].isfinite().all(), name
    assert (poisoned["dk"].masked_fill(~hole, 0) == 0).all()


def test_any_strides():
    case = Case(29, 29, 16, 16)
    inputs, layout, valid = make(case)
    expected = results(case, inputs, layout, valid)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    turned[2] = turned[2].transpose(2, 3).contiguous().transpose(2, 3)
    assert turned[0].stride() != inputs[0].stride() and turned[2].stride(-1) != 1
    got = results(case, [*turned, inputs[3]], layout, valid)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradient_through_one_output(through):
    """Whoever uses only one of the two outputs gets its gradient, with none for the other."""
    case = Case(19, 19, 16, 16, keep=1.0)
    grads = {}
    for backend in ("triton", "gather"):
        inputs, layout, _ = make(case)
        q, k, v, bias = (x.requires_grad_() for x in inputs)
        layout = replace(layout, counts=layout.counts.clamp(min=1))
        out, lse = block_sparse_attention(q, k, v, layout, block_bias=bias, causal=False, backend=backend)
        loss = out.square().sum() if through == "out" else lse.square().sum()
        grads[backend] = torch.autograd.grad(loss, (q, k, bias))
    for got, expected in zip(grads["triton"], grads["gather"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keys", "stride"), [(40, 1), (13, 3)])
def test_full_blocks_first_and_hidden_ones_dropped(keys, stride):
    from astbench_kernels.triton.attention.lists import block_states, order_lists, transpose_lists
    from astbench_kernels.triton.plan import make_plan

    case = Case(40, keys, 8 // stride, 16, padding="tail", lists=2, batch=2, schedule="query_major", stride=stride)
    inputs, layout, valid = make(case)
    plan = make_plan(*inputs[:3], layout, causal=True, schedule="query_major")
    states = block_states(plan, valid, valid.device)
    ordered = order_lists(plan, layout, states, even=True)
    transposed = transpose_lists(plan, layout, states, even=True)
    pairs = layout.token_mask(causal=True, key_valid=valid)
    by_block = {}
    for b in range(2):
        for listing in range(2):
            for group in range(layout.num_groups):
                rows = layout.row_groups() == group
                full, partial = set(), set()
                for slot in range(int(layout.counts[b, listing, group])):
                    block = int(layout.indices[b, listing, group, slot])
                    seen = pairs[b, listing, rows][:, block * case.block :][:, : case.block]
                    if seen.any():
                        (full if seen.all() else partial).add((block, slot))
                        code = group * plan.width + slot
                        by_block.setdefault((b, listing, block, not seen.all()), set()).add(code)
                here = (b, listing, group)
                entries = list(zip(ordered.blocks[here].tolist(), ordered.slots[here].tolist(), strict=True))
                num_full, num_seen = int(ordered.num_full[here]), int(ordered.num_seen[here])
                assert set(entries[:num_full]) == full and set(entries[num_full:num_seen]) == partial
                assert num_seen == len(full | partial)
    assert transposed.num_chunks == 1 and by_block
    for b in range(2):
        for listing in range(2):
            starts, entries = transposed.starts[b, listing].tolist(), transposed.entries[b, listing].tolist()
            for cell in range(2 * layout.num_blocks):
                got = set(entries[starts[cell] : starts[cell + 1]])
                assert got == by_block.get((b, listing, cell // 2, bool(cell % 2)), set())


@pytest.mark.skipif(DEVICE != "cpu", reason="nothing is interpreted on a GPU")
def test_key_major_refuses_carried_lists():
    with pytest.raises(ValueError, match="schedule 'key_major' takes no carried lists"):
        compare(Case(13, 13, 8, 4, carried=True, schedule="key_major"))


def test_interpreter_refuses_bfloat16():
    (q, k, v, _), layout, _ = make(Case(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="interpreter multiplies the bits of bfloat16"):
        block_sparse_attention(q, k, v, layout, backend="triton")


@pytest.mark.parametrize(
    ("group", "lists", "schedule"),
    [(1, 4, "key_major"), (8, 4, "key_major"), (8, 2, "query_major"), (8, 1, "query_major"), (16, 4, "query_major")],
)
def test_rows_per_list_choose_the_schedule(group, lists, schedule):
    from astbench_kernels.triton.plan import make_plan

    inputs, layout, _ = make(Case(group=group, lists=lists))
    assert make_plan(*inputs[:3], layout, causal=True).schedule == schedule


def test_no_keys_and_no_queries():
    layout = BlockLayout(
        torch.zeros(1, 2, 1, 1, dtype=torch.int32), torch.zeros(1, 2, 1, dtype=torch.int32), 8, 4, 3, 0
    )
    q, k = torch.ones(1, 2, 3, 16, requires_grad=True), torch.ones(1, 2, 0, 16)
    out, lse = block_sparse_attention(q.to(DEVICE), k.to(DEVICE), k.to(DEVICE), layout, backend="triton")
    out.sum().backward()
    assert (out == 0).all() and (lse == -torch.inf).all() and (q.grad == 0).all()


# ----- what it refuses


def test_refusals_name_every_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton is not installed.*needs a CUDA device.*not float64.*size 257"):
        choose_backend("triton", torch.device("cpu"), dtype=torch.float64, head_dim=257)
    assert choose_backend("auto", torch.device("cuda")) == "gather"


def test_calls_that_it_cannot_serve():
    (q, k, v, _), layout, _ = make(Case(dtype=torch.float64))
    with pytest.raises(ValueError, match="computes in float16, bfloat16 and float32, not float64"):
        block_sparse_attention(q, k, v, layout, backend="triton")
    (q, k, v, _), layout, _ = make(Case(value_dim=320))
    with pytest.raises(ValueError, match="head size 320 is above 256"):
        block_sparse_attention(q, k, v, layout, backend="triton")


def test_auto_takes_triton_on_cuda_only(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("auto", cuda) == "triton"
    assert choose_backend("auto", cuda, dtype=torch.bfloat16, head_dim=128) == "triton"
    assert choose_backend("auto", cuda, dtype=torch.float64, head_dim=128) == "gather"
    assert choose_backend("auto", cuda, dtype=torch.float16, head_dim=300) == "gather"
    assert choose_backend("auto", cpu, dtype=torch.float32, head_dim=64) == "gather"


def test_import_does_not_import_triton():
    code = "import astbench_kernels, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "case",
    [
        Case(47, 63, 16, 16, offset=16, padding="tail", batch=2),
        Case(40, 80, 32, 32, offset=40, causal=False, lists=2, bias=False),
        Case(63, 63, 16, 64, lists=1, dtype=torch.float16),
    ],
    ids=["a-list-a-head", "a-list-a-key-head", "one-list-half-precision"],
)
def test_one_backward_pass_in_place_of_two(case, monkeypatch):
    from astbench_kernels.triton.attention import function

    def refuse(*arguments, **options):
        raise AssertionError("there is to be one pass")

    monkeypatch.setattr(function, "_backward_query_major", refuse)
    compare(case, backend="triton_one_pass")


def test_one_pass_is_refused_where_additions_must_be_in_order():
    (q, k, v, _), layout, _ = make(Case(32, 32, 16, 16, lists=1))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match=r"'triton_one_pass' cannot run .* deterministic .* take triton"):
            block_sparse_attention(q, k, v, layout, causal=True, backend="triton_one_pass")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_longest_lists_and_the_busiest_blocks_start_first():
    from astbench_kernels.triton.attention.lists import block_states, order_lists, transpose_lists
    from astbench_kernels.triton.plan import make_plan

    case = Case(128, 128, 16, 16, causal=False, batch=2)
    (q, k, v, _), layout, _ = make(case)
    plan = make_plan(q, k, v, layout, causal=False)
    states = block_states(plan, None, q.device)
    turns = order_lists(plan, layout, states, even=True).turns.long().cpu()
    lengths = layout.counts.cpu().gather(-1, turns)
    assert (lengths.diff(dim=-1) <= 0).all() and torch.equal(turns.sort(-1).values, torch.arange(8).expand_as(turns))
    assert (layout.counts.diff(dim=-1) > 0).any(), "they are of several lengths, in no order"
    turns = transpose_lists(plan, layout, states, even=True).turns.long().cpu()
    rows = layout.to_mask().cpu().sum(2).view(2, case.kv_heads, -1, 8).sum(2).gather(-1, turns)
    assert (rows.diff(dim=-1) <= 0).all() and torch.equal(turns.sort(-1).values, torch.arange(8).expand_as(turns))
