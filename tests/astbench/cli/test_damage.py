"""Checkpoints that are whole and wrong, unverified or not the last, and configs that were edited."""

import json

import pytest
import torch

from astbench.files.writing import sha256
from astbench.runs.folder import CONFIG, LAST, MANIFEST, METRICS, PREVIOUS, RECORD, TOKENIZER
from tests.astbench.cli.commands import FIT
from tests.astbench.cli.test_cli import assert_refused


def without(key):
    return lambda checkpoint: {k: v for k, v in checkpoint.items() if k != key}


def changed(key, change):
    return lambda checkpoint: {**checkpoint, key: change(checkpoint[key])}


DAMAGES = {
    "a list": lambda c: [1],
    "another mapping": lambda c: {"a": 1},
    "no options": without("hyper_parameters"),
    "options of another kind": changed("hyper_parameters", lambda _: "x"),
    "no attention": changed("hyper_parameters", lambda h: {**h, "attention": None}),
    "no weights": without("state_dict"),
    "empty weights": changed("state_dict", lambda _: {}),
    "weights of text": changed("state_dict", lambda w: dict.fromkeys(w, "x")),
    "weights of another shape": changed("state_dict", lambda w: {k: torch.zeros(1) for k in w}),
    "more weights": changed("state_dict", lambda w: {**w, "more": torch.zeros(1)}),
    "no version": without("pytorch-lightning_version"),
}
RESUME_DAMAGES = {
    "no optimizer": without("optimizer_states"),
    "empty optimizer": changed("optimizer_states", lambda _: []),
    "forgetful optimizer": changed("optimizer_states", lambda o: [{**o[0], "state": {}}]),
    "optimizer of another shape": changed(
        "optimizer_states",
        lambda o: [{**o[0], "state": {k: {**s, "exp_avg": torch.zeros(2, 3, 5)} for k, s in o[0]["state"].items()}}],
    ),
    "optimizer of another model": changed("optimizer_states", lambda o: [{**o[0], "param_groups": []}]),
    "no loops": without("loops"),
    "empty loops": changed("loops", lambda _: {}),
    "no schedule": changed("lr_schedulers", lambda _: []),
    "another step": changed("global_step", lambda step: step - 1),
}


def damage(folder, change):
    """Another content in a file that its manifest vouches for, as whoever may write the folder could make it."""
    torch.save(change(torch.load(folder / LAST, weights_only=True)), folder / LAST)
    (folder / MANIFEST).write_text(json.dumps({sha256(folder / LAST): {"step": 3, "epoch": 0}}))


@pytest.mark.parametrize("what", DAMAGES)
def test_a_whole_file_of_the_wrong_content_is_a_checkpoint_error(astbench, tmp_path, stopped, what):
    damage(stopped, DAMAGES[what])
    for words in (
        ["validate", f"--ckpt_path={stopped}", f"--run_dir={tmp_path / 'v'}"],
        ["fit", f"--resume={stopped}"],
        [*FIT, f"--init_from={stopped}", f"--run_dir={tmp_path / 'i'}"],
    ):
        outcome = astbench(*words)
        if what == "more weights" and words[-2:-1] == [f"--init_from={stopped}"]:
            assert outcome.code == 0  # of another run only what the model has is taken
        else:
            assert_refused(outcome, 6)
            assert len(outcome.err) < 1000


@pytest.mark.parametrize("what", RESUME_DAMAGES)
def test_resuming_needs_all_that_it_goes_on_with(astbench, stopped, what):
    damage(stopped, RESUME_DAMAGES[what])
    outcome = astbench("fit", f"--resume={stopped}")
    assert_refused(outcome, 6)
    assert len(outcome.err) < 1000


def test_resuming_from_the_checkpoint_before_says_so(astbench, stopped):
    (stopped / LAST).write_bytes(b"x")
    outcome = astbench("fit", f"--resume={stopped}")
    assert outcome.code == 0, outcome.err
    assert f"note: {stopped / LAST} is damaged" in outcome.out.split("done:")[0]
    assert f"{PREVIOUS} is taken in its place, of step 2" in outcome.out


def test_a_checkpoint_without_its_manifest_is_said_to_be_unverified(astbench, tmp_path, stopped):
    (stopped / MANIFEST).unlink()
    for number, asked in enumerate((stopped, stopped / LAST)):
        outcome = astbench("validate", f"--ckpt_path={asked}", f"--run_dir={tmp_path / str(number)}")
        assert outcome.code == 0, outcome.err
        assert f"note: {stopped / LAST} is unverified" in outcome.out
    outcome = astbench(*FIT, "--trainer.max_steps=1", f"--init_from={stopped}", f"--run_dir={tmp_path / 'i'}")
    assert outcome.code == 0 and "is unverified" in outcome.out


def test_a_run_goes_on_as_it_was_configured(astbench, stopped):
    before = (stopped / CONFIG).read_text()
    (stopped / CONFIG).write_text(before.replace("lr: 0.003", "lr: 0.004"))
    assert (stopped / CONFIG).read_text() != before
    assert_refused(astbench("fit", f"--resume={stopped}"), 6, CONFIG, "--init_from=")
    # A run of before, whose record holds no digest, goes on, with a note.
    record = json.loads((stopped / RECORD).read_text())
    del record["config_sha256"]
    (stopped / RECORD).write_text(json.dumps(record))
    outcome = astbench("fit", f"--resume={stopped}")
    assert outcome.code == 0 and f"{stopped / CONFIG} is unverified" in outcome.out


def test_a_checkpoint_asked_for_by_its_file_is_verified_before_it_is_read(astbench, tmp_path, stopped):
    (stopped / LAST).write_bytes(b"x")
    words = ["validate", f"--ckpt_path={stopped / LAST}", f"--run_dir={tmp_path / 'v'}"]
    assert_refused(astbench(*words), 6, "does not match its sha256")
    (stopped / MANIFEST).write_text(json.dumps({sha256(stopped / LAST): {"step": 3, "epoch": 0}}))
    assert_refused(astbench(*words), 6, "cannot be read")


def test_another_tokenizer_is_refused(astbench, tmp_path, stopped):
    file = stopped / TOKENIZER / "tokenizer.json"
    before = file.read_text()
    file.write_text(before.replace('"the"', '"thf"'))
    assert file.read_text() != before
    for words in (
        ["validate", f"--ckpt_path={stopped}", f"--run_dir={tmp_path / 'v'}"],
        ["validate", f"--ckpt_path={stopped / LAST}", f"--run_dir={tmp_path / 'v'}"],
        ["fit", f"--resume={stopped}"],
        [*FIT, f"--init_from={stopped}", f"--run_dir={tmp_path / 'i'}"],
    ):
        assert_refused(astbench(*words), 6, f"{stopped / TOKENIZER} does not match its sha256")
    # The manifest of a run of before has no entry for it.
    entries = {key: entry for key, entry in json.loads((stopped / MANIFEST).read_text()).items() if "step" in entry}
    (stopped / MANIFEST).write_text(json.dumps(entries))
    assert astbench(*words).code == 0


@pytest.mark.parametrize("name", [MANIFEST, RECORD])
def test_brackets_without_end_are_damage(astbench, stopped, name):
    (stopped / name).write_text("[" * 100_000)
    outcome = astbench("fit", f"--resume={stopped}")
    assert outcome.code == (6 if name == MANIFEST else 0), outcome.err
    assert name == MANIFEST or "is unverified" in outcome.out


@pytest.mark.parametrize("change", [lambda t: None, lambda t: t.replace("step", "stap"), lambda t: t.replace("1", "2")])
def test_a_log_that_is_not_as_it_was_is_said_to_be(astbench, stopped, change):
    text = change((stopped / METRICS).read_text())
    (stopped / METRICS).unlink() if text is None else (stopped / METRICS).write_text(text)
    outcome = astbench("fit", f"--resume={stopped}")
    assert outcome.code == 0 and f"note: {stopped / METRICS} is not as it was at step 3" in outcome.out
