"""`--backbone.calibrate`: when the attention looks at the dense model, and when it does not."""

import json

import pytest
import torch

from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import DONE
from tests.astbench.conftest import DEMO, NAMES
from tests.astbench.tasks.lm.test_lm import make_model, text
from tests.astbench.tasks.mt import test_mt_cli

INDEX = ["--attention.index_dim=2", "--attention.block_size=4", "--attention.min_blocks=1", "--attention.top_k=4"]
STILL = ["--optim.lr=1.0e-30", "--optim.attention_lr=1.0e-30", "--trainer.max_steps=1"]
"""One step that moves nothing."""


def pretrained(tmp_path):
    """Options of a language model with weights, and of texts for it."""
    folder, _, _ = make_model(tmp_path / "model")
    data = tmp_path / "text"
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"wiki.{split}.raw").write_text(text() * 3, encoding="utf-8")
    words = ["--task=wikitext103", "--data.source=local", f"--data.path={data}", f"--backbone.name={folder}"]
    return [*words, "--data.context=128", "--data.windows=4"]


def index_weights(folder):
    state = read_checkpoint(str(folder))["state_dict"]
    return {name: value for name, value in state.items() if ".index." in name}


def test_an_evaluation_of_a_pretrained_model_begins_with_it(astbench, tmp_path):
    words = pretrained(tmp_path)
    lost = {}
    for name, more in (
        ("random", ["--attention=ast", *INDEX]),
        ("calibrated", ["--attention=ast", *INDEX, "--backbone.calibrate=2"]),
    ):
        outcome = astbench("validate", *words, *more, f"--run_dir={tmp_path / name}")
        assert outcome.code == 0, outcome.err
        lost[name] = json.loads((tmp_path / name / "record.json").read_text())["metrics"]["nll"]
    assert lost["calibrated"] != lost["random"]


def test_the_density_of_an_evaluation_is_not_that_of_its_calibration(astbench, tmp_path):
    """The first pass that looks for the share keeps far more."""
    words = [*pretrained(tmp_path), "--attention=ast", "--attention.block_size=4"]
    words += ["--attention.min_blocks=1", "--attention.lists=carried", "--attention.query_tile=8"]
    words += ["--attention.budget=calibrated", "--attention.density=0.25", "--backbone.calibrate=3"]
    outcome = astbench("validate", *words, f"--run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    density = json.loads((tmp_path / "run" / "record.json").read_text())["density"]
    assert abs(density["tiles"] - 0.25) < 0.03, density["tiles"]


def test_a_fit_starts_from_it_and_a_checkpoint_brings_it_along(astbench, tmp_path, monkeypatch):
    words = ["fit", *NAMES, *DEMO, *INDEX, *STILL]
    for name, more in (("run", ["2"]), ("again", ["2"]), ("random", ["0"])):
        outcome = astbench(*words, f"--backbone.calibrate={more[0]}", f"--run_dir={tmp_path / name}")
        assert outcome.code == 0, outcome.err
    mine, theirs, drawn = (index_weights(tmp_path / name) for name in ("run", "again", "random"))
    assert mine and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any(torch.equal(mine[name], drawn[name]) for name in mine)
    with monkeypatch.context() as patch:
        patch.setattr("astbench.backbones.swap.SwapHandle.calibrating", None)  # nobody may ask for it
        loaded = astbench("validate", f"--ckpt_path={tmp_path / 'run'}", f"--run_dir={tmp_path / 'loaded'}")
        (tmp_path / "again" / DONE).unlink()
        resumed = astbench("fit", f"--resume={tmp_path / 'again'}")
        more = ["--backbone.calibrate=2", f"--init_from={tmp_path / 'run'}", f"--run_dir={tmp_path / 'on'}"]
        onward = astbench(*words, *more)
    for outcome in (loaded, resumed, onward):
        assert outcome.code == 0, outcome.err
    first, second = (json.loads((tmp_path / name / "record.json").read_text())["metrics"] for name in ("run", "loaded"))
    assert first == second


def test_less_than_no_batches_are_refused(astbench):
    outcome = astbench("fit", *NAMES, *DEMO, "--backbone.calibrate=-1")
    assert outcome.code == 2 and "--backbone.calibrate must be 0 or more batches, got -1" in outcome.err


@pytest.mark.slow
def test_an_encoder_decoder_is_calibrated_in_all_places(astbench, tmp_path):
    outcome = astbench(
        *test_mt_cli.FIT, *STILL, "--attention.index_dim=2", "--backbone.calibrate=1", f"--run_dir={tmp_path / 'run'}"
    )
    assert outcome.code == 0, outcome.err
    assert len(index_weights(tmp_path / "run")) == 2 * 6


def test_a_fit_from_a_dense_run_calibrates(astbench, tmp_path):
    """It brings no index: the attention's own weights start anew."""
    dense = ["fit", "--attention=dense", *NAMES[1:], *DEMO, *STILL, f"--run_dir={tmp_path / 'dense'}"]
    assert astbench(*dense).code == 0
    words = ["fit", *NAMES, *DEMO, *INDEX, *STILL, f"--init_from={tmp_path / 'dense'}"]
    outcome = astbench(*words, "--backbone.calibrate=2", f"--run_dir={tmp_path / 'ast'}")
    assert outcome.code == 0, outcome.err
    assert "calibrated: 3 of 3 layers start from the model's own queries and keys" in outcome.out
    assert astbench(*words, f"--run_dir={tmp_path / 'random'}").code == 0
    mine, drawn = (index_weights(tmp_path / name) for name in ("ast", "random"))
    assert mine and not any(torch.equal(mine[name], drawn[name]) for name in mine)


def test_an_attention_that_does_not_look_is_said_to_start_as_ever(astbench, tmp_path):
    words = ["fit", "--attention=local", *NAMES[1:], *DEMO, *STILL, "--backbone.calibrate=1"]
    outcome = astbench(*words, f"--run_dir={tmp_path / 'run'}")
    assert outcome.code == 0 and "calibrated: 0 of 3 layers" in outcome.out


def test_a_budget_is_calibrated_said_recorded_and_kept(astbench, tmp_path):
    words = ["fit", *NAMES, *DEMO, *STILL, "--attention.block_size=4", "--attention.min_blocks=1"]
    words += ["--attention.budget=calibrated", "--attention.density=0.4"]
    first = astbench(*words, "--backbone.calibrate=1", f"--run_dir={tmp_path / 'run'}")
    assert first.code == 0, first.err
    assert first.out.count("calibrated: blocks of at least ") == 2 and "(0.4 wanted, " in first.out
    loaded = astbench("validate", f"--ckpt_path={tmp_path / 'run'}", f"--run_dir={tmp_path / 'loaded'}")
    onward = astbench(
        *words, f"--init_from={tmp_path / 'run'}", "--backbone.calibrate=1", f"--run_dir={tmp_path / 'on'}"
    )
    for outcome in (loaded, onward):
        assert outcome.code == 0, outcome.err
        assert "calibrated: " not in outcome.out
    density, again, on = (
        json.loads((tmp_path / name / "record.json").read_text())["density"] for name in ("run", "loaded", "on")
    )
    assert density["calibrated_share"] == again["calibrated_share"] == on["calibrated_share"] != 0.01
    assert abs(density["mean"] - 0.4) < 0.15  # other texts, and most of a row's blocks are padding
    none = astbench(*words, f"--run_dir={tmp_path / 'none'}")
    assert none.code == 0 and "keeps what --attention.share says" in none.out
