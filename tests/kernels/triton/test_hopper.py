"""The Hopper kernels: on a CPU run as they are written, by an interpreter of Gluon; and which calls they take.

On a device they are held to the same cases by `make gpu`.
"""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from astbench.bench.hopper_cases import CASES, Case, errors, make, smaller, wrong
from astbench_kernels import attention, block_sparse_attention, choose_backend, what_runs
from astbench_kernels import triton as package
from astbench_kernels.dispatch import hopper as rule
from astbench_kernels.dispatch import rules
from astbench_kernels.triton.plan import make_plan
from tests.kernels.conftest import DEVICE

triton = pytest.importorskip("triton", reason="triton is not installed")

if not package.has_gluon():
    pytest.skip("this triton has no Gluon", allow_module_level=True)

on_cpu = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs the kernels themselves: make gpu"),
    pytest.mark.skipif(
        triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="the interpreter of this triton needs numpy below 2.4",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("interpreter"),
]


def interpreted(monkeypatch, processors=3, seed=0):
    """The kernels' host code, with their launches run by the interpreter on so few processors that programs stay."""
    from astbench_kernels.triton.hopper import function
    from tests.kernels.triton.gluon_interpreter import Interpreter

    monkeypatch.setattr(rules, "ASSUMED_PROCESSORS", processors)
    interpreter = Interpreter(seed)
    monkeypatch.setattr(function, "launch_gluon", interpreter)

    def attend(q, k, v, layout, *, block_bias, causal):
        options = {"block_bias": block_bias, "causal": causal, "key_valid": None, "scale": q.shape[-1] ** -0.5}
        return package.triton_attention(q, k, v, layout, **options, hopper=True)

    return attend, interpreter


class TestInterpreted:
    pytestmark = on_cpu

    @pytest.mark.parametrize("name", CASES)
    def test_cases(self, name, monkeypatch):
        case = smaller(CASES[name], 4)
        attend, interpreter = interpreted(monkeypatch)
        assert not wrong(case, errors(case, attend, "cpu"))
        assert [kernel for kernel, *_ in interpreter.launched] == ["forward", "backward_kv", "backward_q"]

    @pytest.mark.parametrize("seed", range(4))
    def test_any_order_of_events(self, seed, monkeypatch):
        """Empty lists, and several tiles for each program that stays."""
        case = replace(smaller(CASES["uneven, some empty"], 4), dim=64)
        attend, _ = interpreted(monkeypatch, processors=1 + seed % 2, seed=1000 * seed)
        assert not wrong(case, errors(case, attend, "cpu", seed))

    def test_inputs_that_the_copy_engine_cannot_address(self, monkeypatch):
        """A tensor that is broadcast, one that starts in the middle of 16 bytes, one with odd strides."""
        attend, _ = interpreted(monkeypatch)
        case = replace(smaller(CASES["causal"], 4), heads=1, kv_heads=1, lists=1, dim=64)
        (q, k, v, _), layout = make(case, "cpu", 0)
        odd = torch.zeros(1, 1, 256, 67, dtype=q.dtype)
        odd[..., 1:65] = k
        shifted = torch.zeros(v.numel() + 1, dtype=v.dtype)[1:].view_as(v).copy_(v)
        broadcast = q[:, :, :1].expand_as(q)
        # Memory's own strides of a dimension of one entry may be anything.
        q1 = broadcast.as_strided(broadcast.shape, (3, 5, *broadcast.stride()[2:]))
        out, lse = attend(q1, odd[..., 1:65], shifted, layout, block_bias=None, causal=True)
        right, known = block_sparse_attention(
            q1.double(), k.double(), v.double(), layout, causal=True, backend="reference"
        )
        torch.testing.assert_close(out.double(), right, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), known, rtol=1e-4, atol=1e-4)

    def test_only_the_output_or_only_the_log_sum_exp_has_a_gradient(self, monkeypatch):
        attend, _ = interpreted(monkeypatch)
        case = replace(smaller(CASES["64 rows"], 8), heads=1, kv_heads=1, lists=1, dim=64, density=1.0)
        (*inputs, _), layout = make(case, "cpu", 0)
        for which in (0, 1):
            found = []
            for run, dtype in ((attend, case.dtype), (block_sparse_attention, torch.float64)):
                leaves = [x.to(dtype).requires_grad_() for x in inputs]
                out = run(*leaves, layout, block_bias=None, causal=False)[which]
                found.append(torch.autograd.grad(out.sum(), leaves, materialize_grads=True))
            for got, right in zip(*found, strict=True):
                torch.testing.assert_close(got.double(), right, rtol=3e-2, atol=3e-2)

    def test_lists_of_64_bits(self, monkeypatch):
        attend, _ = interpreted(monkeypatch)
        case = replace(smaller(CASES["carried"], 8), dim=64)
        (*inputs, _), layout = make(case, "cpu", 0)
        wide = {name: getattr(layout, name).long() for name in ("indices", "counts", "since")}
        found = [attend(*inputs, one, block_bias=None, causal=True)[0] for one in (layout, replace(layout, **wide))]
        assert torch.equal(*found)

    def test_it_is_held_to_the_reference_before_its_first_call(self, monkeypatch):
        _, interpreter = interpreted(monkeypatch)
        run = attention._BACKENDS["triton_hopper"].run
        for call in attention.HOPPER_CALLS:
            attention.self_check("triton_hopper", run, torch.device("cpu"), torch.bfloat16, call)
        assert {tile.rows for kernel, _, tile in interpreter.launched if kernel == "forward"} == {64, 128}

        def broken(*args, **kwargs):
            out, lse = run(*args, **kwargs)
            return out * 1.1, lse

        with pytest.raises(ValueError, match=r"refused .* out is off by .*; set backend to triton_plain"):
            attention.self_check("triton_hopper", broken, torch.device("cpu"), torch.bfloat16, call)


# What was done to a kernel, and what the interpreter says of it; "": anything, or wrong numbers.
MUTATIONS = {
    "values are given back while they are read": (
        "forward", "_consumer",
        r"(acc, packed = warpgroup_mma_wait\(0, deps=\[acc, packed\]\))\n( +)(mbarrier.arrive\(v_empty.*)",
        r"\3\n\2\1",
        "overwritten while a product reads it",
    ),
    "values are not waited for": (
        "forward", "_consumer", r"mbarrier.wait\(v_full.index\(before\), before_phase\)", "pass",
        "read before its copy landed",
    ),
    "a wait that leaves one product too many": (
        "forward", "_consumer", r"warpgroup_mma_wait\(1, deps=\[logits\]\)", "warpgroup_mma_wait(2, deps=[logits])",
        "the result of a product that may be under way",
    ),
    "the ring is never given back": (
        "backward_q", "_consumer", r"mbarrier.arrive\(k_empty.index\(before\), count=1\)", "pass", "deadlock",
    ),
    "rows are never given back": (
        "forward", "_consumer", r"mbarrier.arrive\(q_empty, count=1\)", "pass", "deadlock",
    ),
    "bytes that were not announced": (
        "pieces", "produce_keys", r"expect\(k_full.index\(stage\), KEYS \* DIM \* 2\)",
        "expect(k_full.index(stage), KEYS * DIM)", "bytes that the barrier was not told of|read before its copy landed",
    ),
    "two arrivals for one": (
        "backward_kv", "_step", r"mbarrier.arrive\(o_empty.index\(stage\), count=1\)",
        "mbarrier.arrive(o_empty.index(stage), count=2)", "one arrival too many",
    ),
    "the wrong block of a list": (
        "pieces", "first_key", r"step // \(BLOCK // KEYS\)", "step // (BLOCK // KEYS) + 1", "",
    ),
    "carried lists that are not": (
        "pieces", "allowed_of", r"rank\[:, None\] >= first\[None, :\]", "rank[:, None] >= 0 * first[None, :]", "",
    ),
    "carried lists that are not, for the keys": (
        "backward_kv", "_consumer", r"rank >= gl.load\(since \+ table \+ code\)", "rank >= 0", "",
    ),
}  # fmt: skip


class TestTheInterpreterSees:
    """Faults that a device would hang on, or answer with wrong numbers."""

    pytestmark = on_cpu

    @pytest.mark.parametrize("name", MUTATIONS)
    def test_mutation(self, name, monkeypatch):
        module, function, old, new, said = MUTATIONS[name]
        case = small(keys=1024, density=1.0, carried=True)  # full blocks and partial ones
        attend, interpreter = interpreted(monkeypatch, processors=1)
        kernel = getattr(import_module(f"astbench_kernels.triton.hopper.{module}"), function)
        source = inspect.getsource(kernel.fn)
        changed = re.sub(old, new, source)
        assert changed != source, "the kernel has no such line any more"
        world = interpreter.world(kernel.fn.__globals__)
        code = compile("from __future__ import annotations\n" + changed.replace("@gluon.jit\n", ""), function, "exec")
        exec(code, world)
        interpreter.kernels[kernel] = world.pop(function)
        world[function] = interpreter._stand_in(kernel)
        if said:
            with pytest.raises(AssertionError, match=said):
                for interpreter.seed in range(0, 20_000, 1000):  # not every order of events shows it
                    errors(case, attend, "cpu")
        else:
            with suppress(AssertionError):
                assert not wrong(case, errors(case, attend, "cpu"))
                pytest.fail("nothing is said of it")


def plan_of(case, **options):
    (*inputs, _), layout = make(case, "cpu", 0)
    return make_plan(*inputs, layout, causal=case.causal, **options)


def small(**changes):
    return Case(**{"rows": 256, "keys": 256, "heads": 1, "kv_heads": 1, "lists": 1} | changes)


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (small(dtype=torch.float32), {}, "dtype is float32, not float16 or bfloat16"),
        (small(dim=136), {}, "head size 136 is not a multiple of 8 up to 128"),
        (small(dim=20), {}, "head size 20 is not a multiple of 8"),
        (small(block=48), {}, "block_size 48 is not one of 16, 32, 64, 128"),
        (small(group=96), {}, "96 query rows share a list, not a multiple of 64"),
        (small(heads=3, group=64), {}, "3 query heads share a list and its keys, not a power of two"),
        (small(), {"padded": True}, "there is padding"),
        (small(), {"arch": 80}, "compute capability is 8.0, not 9.0"),
        (small(), {"arch": 100}, "compute capability is 10.0, not 9.0"),
        (small(), {"one_pass": True}, "one backward pass is asked for"),
    ],
)
def test_what_they_do_not_serve_is_refused_or_left_to_the_others(case, options, reason, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        plan_of(case, hopper=True, **options)
    assert str(refusal.value).endswith("set backend to triton") and "\n" not in str(refusal.value)
    monkeypatch.setattr("astbench_kernels.triton.plan._on_cuda", lambda device: True)
    assert plan_of(case, **options).schedule == "query_major"


def test_an_older_triton_is_refused(monkeypatch):
    monkeypatch.setattr("astbench_kernels.triton.plan.has_gluon", lambda: False)
    with pytest.raises(ValueError, match="this triton has no Gluon"):
        plan_of(small(), hopper=True)


def test_nothing_takes_what_never_ran_unasked(monkeypatch):
    monkeypatch.setattr("astbench_kernels.triton.plan._on_cuda", lambda device: True)
    monkeypatch.setattr(rule, "RAN_ON_A_DEVICE", False)
    for rows, block, dim in rule.TIMED:
        assert plan_of(small(group=rows, block=block, dim=dim)).schedule == "query_major"
        assert plan_of(small(group=rows, block=block, dim=dim), hopper=True).schedule == "hopper"


def test_auto_takes_them_where_shapes_were_timed(monkeypatch):
    monkeypatch.setattr(rule, "RAN_ON_A_DEVICE", True)
    assert plan_of(small()).schedule == "query_major"  # a CPU is no device for them
    monkeypatch.setattr("astbench_kernels.triton.plan._on_cuda", lambda device: True)
    for rows, block, dim in rule.TIMED:
        assert plan_of(small(group=rows, block=block, dim=dim)).schedule == "hopper"
        assert plan_of(small(group=rows, block=block, dim=dim), hopper=False).schedule == "query_major"
        assert plan_of(small(group=rows, block=block, dim=dim), padded=True).schedule == "query_major"
    for untimed in (small(dim=96), small(group=64, block=32), small(carried=True, causal=True)):
        assert plan_of(untimed).schedule == "query_major"
        assert plan_of(untimed, hopper=True).schedule == "hopper"
    assert plan_of(small(rows=1, offset=255, causal=True), gradients=False).schedule == "decode"
    assert all(fast < plain for both in rule.TIMED.values() for fast, plain in zip(both, rule.PLAIN_TIMED, strict=True))


def test_what_is_said_to_run_is_what_runs(monkeypatch):
    (q, k, v, _), layout = make(small(), "cpu", 0)
    monkeypatch.setattr("astbench_kernels.triton.plan._on_cuda", lambda device: True)
    monkeypatch.setattr(rule, "RAN_ON_A_DEVICE", True)
    ran = {name: what_runs(name, q, k, v, layout, causal=False) for name in attention._TRITON}
    assert ran == {
        "triton": "triton (hopper)",
        "triton_hopper": "triton_hopper (hopper)",
        "triton_plain": "triton_plain (query-major)",
        "triton_one_pass": "triton_one_pass (query-major)",
    }
    padding = torch.ones(1, 256, dtype=torch.bool)
    assert what_runs("triton", q, k, v, layout, causal=False, key_valid=padding) == "triton (query-major)"


def test_asked_for_where_they_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="'triton_hopper' cannot run on cpu: it needs a CUDA device"):
        choose_backend("triton_hopper", cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="Gluon, which it is written in, has no interpreter"):
        choose_backend("triton_hopper", cpu)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(package, "_capability", lambda index: 80)
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match=r"it needs compute capability 9.0 \(H100, H200\)"):
        choose_backend("triton_hopper", cuda, dtype=torch.bfloat16)
    monkeypatch.setattr(package, "_capability", lambda index: 90)
    assert choose_backend("triton_hopper", cuda, dtype=torch.bfloat16, head_dim=128) == "triton_hopper"
    with pytest.raises(ValueError, match="head size 256 is not a multiple of 8 up to 128"):
        choose_backend("triton_hopper", cuda, dtype=torch.bfloat16, head_dim=256)


def test_the_first_27_cases_are_there_and_none_is_idle():
    assert len(CASES) >= 34
    for name, case in CASES.items():
        (*_, bias), layout = make(case, "cpu", 0)
        assert layout.counts.max() > 0 and bias.isfinite().all(), name
        assert (layout.since is not None) == case.carried
