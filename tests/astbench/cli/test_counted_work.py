"""Operations and tokens in the record of a run."""

import json

import pytest

from astbench.cli.counted_work import COUNTED, counted_at
from tests.astbench.cli.commands import FIT


@pytest.mark.parametrize("number", [0, 1, 7, 8, 63, 64, 1000, 99_999])
def test_one_step_in_each_part_is_counted(number):
    found = sorted(counted_at(number))
    assert len(found) == (0 if not number else max(1, min(COUNTED, number // COUNTED)))
    for part, step in enumerate(found):
        assert part * number / len(found) <= step < (part + 1) * number / len(found)


def test_where_a_kind_of_step_comes_by_turns_both_are_met():
    assert {step % 2 for step in counted_at(800)} == {0, 1}


def test_a_record_says_what_it_cost(base):
    record = json.loads((base / "record.json").read_text())
    training, evaluation = (record["flops"][part] for part in ("training", "evaluation"))
    assert training["of"] == record["train"]["steps"] == 3 and training["counted"] == 1
    for part in (training, evaluation):
        assert 0 < part["choosing"] < part["attention"] < part["model"] and part["tokens"] > 0
    # Three steps of four windows of up to 128 tokens; a training pass is a forward pass and twice that back.
    assert training["tokens"] <= 3 * 4 * 128
    forward = evaluation["model"] / evaluation["tokens"]
    assert 2 * forward < training["model"] / training["tokens"] < 4 * forward


def test_a_run_that_goes_on_counts_as_one_that_was_not_stopped(stopped, run):
    """What the first process has counted stays, and the steps are those of the whole run."""
    record = json.loads((stopped / "record.json").read_text())
    code, said = run(["fit", f"--resume={stopped}"])
    assert code == 0, said
    again = json.loads((stopped / "record.json").read_text())["flops"]
    assert again["training"] == record["flops"]["training"]


def test_accumulated_batches_are_one_step(run, tmp_path):
    words = [*FIT, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=2", f"--run_dir={tmp_path / 'run'}"]
    code, said = run(words)
    assert code == 0, said
    flops = json.loads((tmp_path / "run" / "record.json").read_text())["flops"]
    (step,) = flops["training_steps"].values()
    assert flops["training"]["tokens"] == 2 * step[3] and step[3] > 4 * 64, "both batches of four"
