"""A killed language-model run goes on to the same weights, bit by bit."""

import json
import signal

import pytest

from astbench.runs.folder import RECORD
from tests.astbench.training.test_resume import EVERY, STEPS, assert_same_end

# Seven articles, three a step: an epoch of two steps, and padding in most batches.
FIT = [
    "fit",
    "--attention=ast",
    "--task=wikitext103",
    "--data.demo_train=7",
    "--data.demo_eval=2",
    "--data.batch_size=3",
    "--data.vocab_size=400",
    "--trainer.log_every_n_steps=1",
    f"--trainer.max_steps={STEPS}",
    f"--checkpoint_every={EVERY}",
]


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["packed", "separate"])
def test_sigkill_then_resume_ends_bitwise_the_same(run, tmp_path, documents):
    words = [*FIT, f"--data.documents={documents}", "--data.context=200"]
    code, out = run([*words, f"--run_dir={tmp_path / 'whole'}"])
    assert code == 0, out
    code, out = run([*words, f"--run_dir={tmp_path / 'run'}"], ("on_train_batch_start", 7, signal.SIGKILL))
    assert code == -signal.SIGKILL, out
    code, out = run(["fit", f"--resume={tmp_path / 'run'}"])
    assert code == 0, out
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / RECORD).read_text())["train"]["steps"] == STEPS
