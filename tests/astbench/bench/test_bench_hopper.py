"""The Hopper kernels' step of `make gpu` without a device: its lists, and what it makes of answers."""

import pytest
import torch

from astbench.bench import hopper
from astbench.bench.hopper_cases import CASES
from astbench.bench.lists import work
from astbench_registry.mask import AttentionMask


@pytest.mark.parametrize("shape", hopper.SHAPES, ids=lambda shape: shape.name)
def test_timed_lists(shape):
    """As dense as they say; causal ones hold a group's own blocks."""
    (q, k, _), layout = hopper.inputs(shape, "cpu", tokens=2048)
    pattern = "causal_self" if shape.causal else "bidirectional_self"
    tiles, most = layout.tiles(causal=shape.causal)
    share = float(tiles.sum()) / (most * hopper.HEADS)
    assert abs(share - shape.density) < 0.12, share  # own blocks weigh much in so short a sequence
    if not shape.carried:
        assert abs(work("forward", q, k, layout, AttentionMask(pattern))["density"] - shape.density) < 0.12
    if shape.causal:
        group = torch.arange(layout.num_groups)
        assert layout.to_mask()[0, 0, group, ((group + 1) * shape.rows - 1) // shape.block].all()
    assert (layout.since is not None) == shape.carried


@pytest.fixture
def answers(monkeypatch):
    """A device is there, and its processes answer with these lines."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hopper, "hopper_device_refusals", lambda device: [])
    asked, lines = [], {"check": [], "time": []}

    def run(calls, end):
        asked.append(calls)
        return lines[calls[0][0]]

    monkeypatch.setattr(hopper, "_run", run)
    return asked, lines


def right(*but):
    return [{"case": name, "wrong": []} for name in (*CASES, *hopper._names()) if name not in but]


def test_all_is_right(answers):
    asked, lines = answers
    lines["check"] = right()
    lines["time"] = [{"shape": "x", "training": False}]
    found = hopper.step(10.0)
    assert found["state"] == "passed" and len(found["cases"]) == len(CASES) and found["times"] == lines["time"]
    assert len(asked[1][0]) == 1 + len(hopper.SHAPES)


def test_what_is_wrong_or_did_not_finish_fails_and_is_not_timed(answers):
    asked, lines = answers
    shape = hopper.SHAPES[0].name
    lines["check"] = [*right("causal", "64 rows", f"{shape}, triton_plain"), {"case": "causal", "wrong": ["dq is off"]}]
    lines["check"].append({"died": "check --share=1 ended with -9"})
    found = hopper.step(10.0)
    assert found["state"] == "failed: 64 rows, causal"
    assert found["cases"]["64 rows"]["wrong"] == ["not finished"] and found["died"] == ["check --share=1 ended with -9"]
    assert f"--only={shape}" not in asked[1][0] and len(asked[1][0]) == len(hopper.SHAPES)
    text = "\n".join(hopper.markdown(found))
    assert f"- {shape}, triton_plain: not finished; not timed" in text
    assert "Hopper kernels: failed: 64 rows, causal." in text and "- check --share=1 ended with -9" in text


def test_a_call_to_be_timed_that_is_wrong_fails(answers):
    _, lines = answers
    name = f"{hopper.SHAPES[1].name}, triton_hopper"
    lines["check"] = [*right(name), {"case": name, "wrong": ["the output is off"]}]
    found = hopper.step(10.0)
    assert found["state"] == f"failed: {name}"
    assert f"- {name}: the output is off; not timed" in "\n".join(hopper.markdown(found))


def test_a_kernel_that_fails_while_it_is_timed_is_said(monkeypatch):
    def fails(q, k, v):
        raise RuntimeError("out of\nmemory")

    def runs(q, k, v):
        return q + k + v

    monkeypatch.setattr(hopper, "clock", lambda call, repeats, device: {"seconds": [float(call().sum() * 0 + 2)]})
    calls = {"triton_hopper": fails, "triton_plain": runs, "dense sdpa_flash": fails}
    known, failed = hopper._interleaved(calls, tuple(torch.ones(1, 1, 2, 2) for _ in range(3)), training=True)
    assert known == {"triton_plain": 2000.0} and failed == {"triton_hopper": "RuntimeError: out of memory"}
    row = {"shape": "128 x 64", "training": True, "failed": failed, "triton_plain_ms": 2.0, "triton_plain_R": None}
    row |= {"triton_hopper_ms": None, "triton_hopper_R": None}
    text = "\n".join(hopper.markdown({"state": "passed", "times": [row]}))
    assert "- 128 x 64, with backward, triton_hopper: RuntimeError: out of memory" in text
    assert "| 128 x 64 | with backward | - | - | 2 | - | - |" in text


def test_a_process_that_ends_badly_says_so():
    (line,) = hopper._run([["nonsense"]], end=1e12)
    assert line["died"].startswith("nonsense ended with 2") and "invalid choice" in line["died"]


def test_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hopper.main([]) == 1
    assert "not run: a CUDA device is needed, and torch finds none" in capsys.readouterr().out
