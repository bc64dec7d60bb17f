"""What the record says of density: pairs of the whole evaluation, however it is cut into batches and processes."""

import json

import pytest

from tests.astbench.cli.commands import SMALL, command

LOCAL = ["fit", "--attention=local", "--attention.window=8", "--task=triviaqa", *SMALL, "--trainer.accelerator=cpu"]


def attended(folder):
    record = json.loads((folder / "record.json").read_text())
    return record["density"], record["backends"], record["picture"]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run whose evaluation is one batch."""
    folder = tmp_path_factory.mktemp("attended") / "whole"
    code, said = run([*LOCAL, "--data.eval_batch_size=64", "--trainer.devices=1", f"--run_dir={folder}"])
    assert code == 0, said
    return folder


def test_density_is_that_of_all_batches(astbench, whole, tmp_path):
    """Nearly: queries that fill up a batch count."""
    outcome = astbench("validate", f"--ckpt_path={whole}", "--data.eval_batch_size=1", f"--run_dir={tmp_path / 'v'}")
    assert outcome.code == 0, outcome.err
    (density, *rest), (expected, *others) = attended(tmp_path / "v"), attended(whole)
    assert density["layers"].keys() == expected["layers"].keys()
    assert density["mean"] == pytest.approx(expected["mean"], rel=0.02) and expected["mean"] < 1
    assert rest == others
    assert expected["measured_on"] == "every attention call of the whole evaluation, 1 batches"
    assert int(density["measured_on"].split()[-2]) >= 4


@pytest.mark.slow
def test_density_is_that_of_all_processes(whole, tmp_path):
    """An odd window is dealt twice to fill up, and counts twice."""
    words = ["validate", f"--ckpt_path={whole}", "--data.eval_batch_size=1", "--trainer.devices=2"]
    done = command(*words, f"--run_dir={tmp_path / 'v'}")
    assert done.returncode == 0, done.stderr
    density, expected = attended(tmp_path / "v")[0], attended(whole)[0]
    assert density["mean"] == pytest.approx(expected["mean"], rel=0.1)
    batches = int(density["measured_on"].split()[-2])
    assert batches >= 4 and batches % 2 == 0


def test_density_of_decoding_counts_every_step(astbench, tmp_path):
    """A decoder that writes token by token sees no pair twice."""
    words = ["--attention=dense", "--task=wmt14", "--data.demo_train=8", "--data.demo_eval=3", "--trainer.max_steps=1"]
    outcome = astbench("fit", *words, "--data.batch_size=4", "--task.beams=2", f"--run_dir={tmp_path / 'r'}")
    assert outcome.code == 0, outcome.err
    density, backends, _ = attended(tmp_path / "r")
    assert density["mean"] == 1 and backends


def test_carried_lists_say_what_share_of_tiles_is_computed(astbench, tmp_path):
    words = ["fit", "--attention=pooled_topk", "--task=wikitext103", "--data.context=64", "--data.batch_size=4"]
    words += ["--data.windows=3", "--trainer.max_steps=1", "--attention.block_size=4", "--attention.top_k=3"]
    words += ["--attention.min_blocks=1", "--attention.query_tile=8"]
    found = {}
    for lists in ("own", "carried"):
        outcome = astbench(*words, f"--attention.lists={lists}", f"--run_dir={tmp_path / lists}")
        assert outcome.code == 0, outcome.err
        found[lists] = attended(tmp_path / lists)[0]
        assert (" of the tiles), on gather" in outcome.out) == (lists == "carried")
    assert "tiles" not in found["own"]
    assert found["own"]["mean"] < found["carried"]["mean"] < found["carried"]["tiles"] < 1
