"""Kill and resume: whatever the moment, the resumed run ends bitwise where the uninterrupted one does."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch

from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import DONE, LAST, METRICS, RECORD
from tests.astbench.conftest import DEMO, NAMES

STEPS, EVERY = 12, 3
# Five batches an epoch: the checkpoints of steps 6 and 12 are in the second and third, that of step 3 in the first.
FIT = ["fit", *NAMES, *DEMO, "--data.demo_train=20", f"--trainer.max_steps={STEPS}", f"--checkpoint_every={EVERY}"]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    code, out = run([*FIT, f"--run_dir={folder}"])
    assert code == 0, out
    return folder


def assert_same_part(ours, theirs):
    """Nested plain data and tensors, bit by bit."""
    ours_flat, theirs_flat = (torch.utils._pytree.tree_flatten(part) for part in (ours, theirs))
    assert ours_flat[1] == theirs_flat[1]
    for a, b in zip(ours_flat[0], theirs_flat[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_end(folder, whole):
    """Weights, optimizer, schedule and log bit by bit; the metrics of the record."""
    ours, theirs = read_checkpoint(folder), read_checkpoint(whole)
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same_part(ours[part], theirs[part])
    assert (folder / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    records = [json.loads((f / RECORD).read_text()) for f in (folder, whole)]
    assert records[0]["state"] == "done" and (folder / DONE).exists()
    for key in ("metrics", "density", "config_hash", "data"):
        assert records[0][key] == records[1][key], key
    assert not list(folder.glob(".*.tmp")), "temporary files stay behind"


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("on_train_batch_start", 1),  # before the first checkpoint: starts again
        pytest.param("on_train_batch_start", 7, marks=pytest.mark.slow),  # a step after a checkpoint
        ("on_train_batch_end", 8),  # a checkpoint is due
        ("on_train_batch_start", 5),  # between two epochs
        ("evaluate", 0),  # training is over
        pytest.param("finish", 0, marks=pytest.mark.slow),
    ],
    ids=[
        "before-any-checkpoint",
        "after-one",
        "just-before-one",
        "between-epochs",
        "before-evaluation",
        "before-the-record",
    ],
)
def test_sigkill_then_resume_ends_bitwise_the_same(run, whole, tmp_path, what, number):
    folder = tmp_path / "run"
    code, out = run([*FIT, f"--run_dir={folder}"], (what, number, signal.SIGKILL))
    assert code == -signal.SIGKILL, out
    assert not (folder / DONE).exists()
    code, out = run(["fit", f"--resume={folder}"])
    assert code == 0, out
    assert_same_end(folder, whole)


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (m % 2)) for m in range(4)])
def test_sigkill_inside_the_writing_of_a_checkpoint(run, whole, tmp_path, moment):
    folder = tmp_path / "run"
    code, _ = run([*FIT, f"--run_dir={folder}"], ("rename", 11 + moment, signal.SIGKILL))
    assert code == -signal.SIGKILL
    code, out = run(["fit", f"--resume={folder}"])
    assert code == 0, out
    assert_same_end(folder, whole)


def test_sigterm_saves_says_how_to_go_on_and_exits_143(run, whole, tmp_path):
    folder = tmp_path / "run"
    code, out = run([*FIT, f"--run_dir={folder}"], ("on_train_batch_start", 4, signal.SIGTERM))
    assert code == 143
    errors = [line for line in out.splitlines() if line.startswith("astbench: error:")]
    assert errors == [f"astbench: error: terminated by SIGTERM at step 4; continue with --resume={folder}"]
    assert read_checkpoint(folder / LAST)["global_step"] == 4
    assert json.loads((folder / RECORD).read_text())["state"] == "terminated"
    code, out = run(["fit", f"--resume={folder}"])
    assert code == 0, out
    assert_same_end(folder, whole)
    record = json.loads((folder / RECORD).read_text())
    (earlier,) = record["earlier"]
    assert earlier["state"] == "terminated" and earlier["argv"][2:] == [*FIT[1:], f"--run_dir={folder}"]
    assert record["argv"] == earlier["argv"] and record["started"] == earlier["started"]
    assert [again["argv"] for again in record["resumed"]] == [["astbench", "fit", f"--resume={folder}"]]
    assert record["train"]["wall_seconds"] > earlier["train"]["wall_seconds"] > 0
    assert (earlier["train"]["steps"], record["train"]["steps"]) == (4, STEPS)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(run, tmp_path):
    folder = tmp_path / "run"
    code, out = run([*FIT, f"--run_dir={folder}"], ("on_train_batch_start", 2, signal.SIGINT))
    assert code == 130, out
    assert out.splitlines()[-1] == f"astbench: error: interrupted at step 2; continue with --resume={folder}"
    assert read_checkpoint(folder / LAST)["global_step"] == 2
    assert json.loads((folder / RECORD).read_text())["state"] == "interrupted"


def test_a_resume_that_fails_says_so_and_loses_no_time(run, tmp_path):
    folder = tmp_path / "run"
    run([*FIT, f"--run_dir={folder}"], ("on_train_batch_start", 7, signal.SIGTERM))
    stopped = json.loads((folder / RECORD).read_text())
    (folder / "tokenizer").rename(folder / "gone")
    code, out = run(["fit", f"--resume={folder}"])
    assert code == 3, out
    failed = json.loads((folder / RECORD).read_text())
    assert failed["state"] == "failed" and "holds no tokenizer" in failed["error"]
    assert failed["train"] == stopped["train"] and failed["train"]["wall_seconds"] > 0
    (folder / "gone").rename(folder / "tokenizer")
    # Killed before its first checkpoint, it loses nothing of the time before either.
    run(["fit", f"--resume={folder}"], ("on_train_batch_start", 1, signal.SIGKILL))
    assert run(["fit", f"--resume={folder}"])[0] == 0
    record = json.loads((folder / RECORD).read_text())
    assert len(record["earlier"]) == 2
    assert record["train"]["wall_seconds"] > stopped["train"]["wall_seconds"]


def test_steps_are_timed_whole(run, tmp_path):
    words = [*FIT, "--trainer.accumulate_grad_batches=3", "--trainer.max_steps=4", f"--run_dir={tmp_path / 'run'}"]
    assert run(words)[0] == 0
    train = json.loads((tmp_path / "run" / RECORD).read_text())["train"]
    assert train["steps"] == train["steps_timed"] == 4


@pytest.mark.slow
def test_evaluation_while_training_comes_at_the_same_steps(run, tmp_path):
    words = [*FIT, "--trainer.val_check_interval=5"]
    assert run([*words, f"--run_dir={tmp_path / 'whole'}"])[0] == 0
    assert (tmp_path / "whole" / METRICS).read_text().count("\n") > STEPS + 2
    run([*words, f"--run_dir={tmp_path / 'run'}"], ("on_train_batch_start", 8, signal.SIGKILL))
    code, out = run(["fit", f"--resume={tmp_path / 'run'}"])
    assert code == 0, out
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_accumulated_gradients_and_sparse_logging(run, tmp_path):
    """Steps of two batches, an epoch of two and a half steps, a row every fourth step."""
    words = [*FIT, "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=4"]
    assert run([*words, f"--run_dir={tmp_path / 'whole'}"])[0] == 0
    for number, how, end in ((9, signal.SIGKILL, -signal.SIGKILL), (13, signal.SIGKILL, -signal.SIGKILL),
                             (8, signal.SIGTERM, 143), (9, signal.SIGTERM, 143), (13, signal.SIGINT, 130)):  # fmt: skip
        folder = tmp_path / f"run{number}{how.name}"
        code, out = run([*words, f"--run_dir={folder}"], ("on_train_batch_start", number, how))
        assert code == end, out
        code, out = run(["fit", f"--resume={folder}"])
        assert code == 0, out
        assert_same_end(folder, tmp_path / "whole")


def test_a_done_run_is_not_resumed(run, whole):
    before = {f: f.stat().st_mtime_ns for f in whole.rglob("*")}
    code, out = run(["fit", f"--resume={whole}"])
    assert (code, out) == (0, f"{whole} is done already; nothing to resume\n")
    assert {f: f.stat().st_mtime_ns for f in whole.rglob("*")} == before


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(run, whole, tmp_path):
    folder = tmp_path / "run"
    run([*FIT, f"--run_dir={folder}"], ("on_train_batch_start", 10, signal.SIGKILL))
    data = bytearray((folder / LAST).read_bytes())
    data[len(data) // 2] ^= 1
    Path(folder / LAST).write_bytes(data)
    code, out = run(["fit", f"--resume={folder}"])
    assert code == 0, out
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_twenty_random_sigkills(run, whole, tmp_path):
    """One run, killed twenty times at random steps and renames, resumed after each."""
    folder, rng, kills = tmp_path / "run", random.Random(20), 0
    words = [*FIT, f"--run_dir={folder}"]
    while kills < 20:
        end = rng.choice([("on_train_batch_start", rng.randrange(4)), ("rename", rng.randrange(2, 9))])
        code, out = run(words, (*end, signal.SIGKILL))
        if code == 0:
            # It got through before the moment came: begin another.
            assert_same_end(folder, whole)
            folder = tmp_path / f"run{kills}"
            words = [*FIT, f"--run_dir={folder}"]
            continue
        assert code == -signal.SIGKILL, out
        kills += 1
        words = ["fit", f"--resume={folder}"]
    code, out = run(words)
    assert code == 0, out
    assert_same_end(folder, whole)
