"""What a run says and records: threads, a schedule that it is too short for, its loss, how far an evaluation is."""

import json

import pytest
import torch

from astbench.runs import progress
from tests.astbench.conftest import DEMO, NAMES


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_recorded_and_a_schedule_without_end_is_said(astbench, tmp_path):
    run = tmp_path / "run"
    schedule = ["--attention.density_start=1.0", "--attention.density_hold=0", "--attention.density_steps=4"]
    outcome = astbench("fit", *NAMES, *DEMO, *schedule, "--trainer.threads=2", f"--run_dir={run}")
    assert outcome.code == 0, outcome.err
    record = json.loads((run / "record.json").read_text())
    assert record["config"]["trainer"]["threads"] == record["hardware"]["threads"] == 2
    assert "threads: 2" in (run / "config.yaml").read_text()
    said = "the density schedule ends at step 4, training at step 3: 75% of the way from 1.0 to 0.25"
    assert outcome.out.count(said) == 2 and "at most 3" in outcome.out
    assert any(said in note for note in record["notes"])
    again = tmp_path / "again"
    torch.set_num_threads(1)
    outcome = astbench("fit", f"--config={run / 'config.yaml'}", "--attention.density_steps=3", f"--run_dir={again}")
    assert outcome.code == 0 and "density schedule" not in outcome.out
    assert json.loads((again / "record.json").read_text())["hardware"]["threads"] == 2
    astbench("validate", f"--ckpt_path={again}", "--trainer.threads=null", f"--run_dir={tmp_path / 'v'}")
    record = json.loads((tmp_path / "v" / "record.json").read_text())
    assert record["config"]["trainer"]["threads"] == 2 and not record["notes"]


@pytest.mark.parametrize("number", ["0", "-1", "1000000", "1.5"])
def test_an_impossible_number_of_threads_is_refused(astbench, number):
    outcome = astbench("fit", *NAMES, *DEMO, f"--trainer.threads={number}")
    assert outcome.code == 2 and "--trainer.threads" in outcome.err


def test_a_short_run_logs_its_loss_and_an_evaluation_its_progress(astbench, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    words = [word for word in DEMO if "log_every" not in word]
    outcome = astbench("fit", *NAMES, *words, "--data.eval_batch_size=4", f"--run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    head, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    place = head.split(",").index("train/loss")
    assert any(row.split(",")[place] for row in rows)
    assert "  batch 1/" in outcome.out
    outcome = astbench("validate", f"--ckpt_path={tmp_path / 'run'}", f"--run_dir={tmp_path / 'v'}")
    assert outcome.code == 0 and "  batch 2/" in outcome.out
    (tmp_path / "a.txt").write_text("Ada Lovelace wrote it.")
    asked = ["--data.question=Who wrote it?", f"--data.document={tmp_path / 'a.txt'}", f"--run_dir={tmp_path / 'p'}"]
    outcome = astbench("predict", f"--ckpt_path={tmp_path / 'run'}", *asked)
    assert outcome.code == 0 and "  batch 1/1" in outcome.out


def test_help_of_fit_names_the_options_without_a_group(astbench, capsys):
    overview = astbench("fit", "--help").out
    with pytest.raises(SystemExit):
        astbench("fit", *NAMES, "--help")
    for text in (overview, capsys.readouterr().out):
        for option in ("--resume=FOLDER", "--seed=N", "--debug", "--trust_config"):
            assert option in text, option
