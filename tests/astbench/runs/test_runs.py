"""Run folders: whole files or none, two checkpoints, a log without lost rows, a record that can be compared."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch

from astbench.errors import CheckpointError, ConfigError, Interrupted, NumericError, Terminated
from astbench.files.writing import sha256, write_atomic, write_json, write_text
from astbench.runs import checkpoints, picture
from astbench.runs.checkpoints import SafeCheckpointIO, read_checkpoint
from astbench.runs.folder import (
    DONE,
    LAST,
    LOCK,
    MANIFEST,
    PREVIOUS,
    RECORD,
    RunFolder,
    checkpoint_file,
    default_run_dir,
    doubts,
)
from astbench.runs.metrics_log import MetricsLogger
from astbench.runs.picture import draw_pattern
from astbench.runs.record import SCHEMA, config_hash, new_record
from astbench.runs.run_record import RunRecord
from astbench.runs.step_clock import StepClock
from astbench_kernels import BlockLayout
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention

# -- files --------------------------------------------------------------------------------------------------


def test_write_atomic_replaces_and_gives_the_digest(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("old", "new and longer"):
        assert write_text(file, text) == sha256(file)
        assert file.read_text() == text
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def write(out):
        out.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomic(file, write)
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_json_holds_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, math.inf, 1.5], "b": {3: (1, -math.inf)}, "c": "Zoë"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, None, 1.5], "b": {"3": [1, None]}, "c": "Zoë"}


# -- the folder ---------------------------------------------------------------------------------------------


def begin(path, resume=False):
    """Open a folder and let go of it at once."""
    folder = RunFolder(path)
    folder.open_for_writing(resume=resume)
    folder.close()
    return folder


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    write_text(begin(tmp_path / "run") / "config.yaml", "")
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume="):
        RunFolder(tmp_path / "run").open_for_writing(resume=False)


def test_what_a_kill_leaves_is_no_run(tmp_path):
    for name in (LOCK, ".config.yaml.x.tmp"):
        (tmp_path / name).touch()
    begin(tmp_path)


def test_a_claimed_folder_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("astbench.runs.folder.default_run_dir", lambda *_: next(names))
    names = (tmp_path / "runs" / name for name in ("a", "a", "b"))  # both see that the first is free
    one, two = RunFolder.claim("t", "x"), RunFolder.claim("t", "x")
    assert (one.path.name, two.path.name) == ("a", "b")
    (one / "something").touch()
    one.abandon()
    two.abandon()
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["a"]


def test_two_processes_cannot_write_in_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open_for_writing(resume=False)
    code = (
        "import sys; from astbench.runs.folder import RunFolder; from astbench.errors import ConfigError\n"
        "try: RunFolder(sys.argv[1]).open_for_writing(resume=True)\n"
        "except ConfigError as error: print(error)"
    )
    other = subprocess.run([sys.executable, "-c", code, folder.path], capture_output=True, text=True, check=True)
    assert "another process writes in" in other.stdout
    folder.close()
    begin(folder.path, resume=True)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open_for_writing(resume=False)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file").open_for_writing(resume=False)


def test_discard_removes_only_what_was_begun_here(tmp_path):
    begun = begin(tmp_path / "begun")
    begun.discard()
    assert not begun.path.exists()
    resumed = begin(tmp_path / "resumed", resume=True)
    resumed.discard()
    assert resumed.path.exists()
    trained = begin(tmp_path / "trained")
    save(trained, 1)
    trained.discard()
    assert trained.path.exists()


def test_opening_again_forgets_that_it_was_done(tmp_path):
    folder = RunFolder(tmp_path)
    write_json(folder / DONE, {})
    assert folder.done
    begin(tmp_path, resume=True)
    assert not folder.done


def test_default_run_dir_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    first = default_run_dir("triviaqa", "./mine.py:Mine")
    first.mkdir(parents=True)
    assert str(first) == "runs/triviaqa-Mine-20260101-000000"
    assert default_run_dir("triviaqa", "./mine.py:Mine").name == "triviaqa-Mine-20260101-000000-2"


# -- checkpoints --------------------------------------------------------------------------------------------


def save(folder, step):
    folder.path.mkdir(exist_ok=True)
    checkpoint = {"global_step": step, "epoch": 0, "state_dict": {"w": torch.full((300,), float(step))}}
    SafeCheckpointIO().save_checkpoint(checkpoint, folder / LAST)


def step_of(path):
    return read_checkpoint(path)["global_step"]


@pytest.fixture
def folder(tmp_path):
    """A run folder after two checkpoints."""
    folder = RunFolder(tmp_path / "run")
    save(folder, 1)
    save(folder, 2)
    return folder


def test_two_checkpoints_are_kept_and_listed(folder):
    assert (step_of(folder / LAST), step_of(folder / PREVIOUS)) == (2, 1)
    save(folder, 3)
    assert (step_of(folder / LAST), step_of(folder / PREVIOUS)) == (3, 2)
    digests = {sha256(folder / name): step for name, step in ((LAST, 3), (PREVIOUS, 2))}
    manifest = folder.manifest()
    assert {d: manifest[d]["step"] for d in digests} == digests
    assert step_of(folder.path) == 3


def flip_a_bit(file, position=-40):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda f: f.write_bytes(b""), lambda f: f.unlink()])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, damage):
    damage(folder / LAST)
    path, entry = folder.newest_checkpoint()
    assert (path.name, entry["step"]) == (PREVIOUS, 1)
    assert step_of(folder.path) == 1


def test_a_flipped_bit_in_the_middle_of_the_weights_is_caught(folder):
    flip_a_bit(folder / LAST, position=len((folder / LAST).read_bytes()) // 2)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        read_checkpoint(folder / LAST)


def test_both_damaged_is_an_error(folder):
    flip_a_bit(folder / LAST)
    truncate(folder / PREVIOUS)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* matches its sha256"):
        folder.newest_checkpoint()


def test_missing_checkpoints(tmp_path):
    assert RunFolder(tmp_path).newest_checkpoint() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint_file(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_file(tmp_path / "x.ckpt")


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_damaged_manifest_is_an_error(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        folder.newest_checkpoint()


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_rename_of_a_save_leaves_a_whole_checkpoint(folder, monkeypatch, moment):
    """A save renames four times: the new file, the manifest, last -> previous, new -> last."""
    calls = []
    rename = os.replace

    def dying(*arguments):
        if len(calls) == moment:
            raise Killed
        calls.append(arguments)
        rename(*arguments)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        save(folder, 3)
    monkeypatch.undo()
    path, entry = folder.newest_checkpoint()
    assert step_of(path) == entry["step"] == 2
    save(folder, 3)
    assert step_of(folder.path) == 3


def test_a_save_needs_no_more_renames_than_are_tested(folder, monkeypatch):
    calls = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append(a), rename(*a)))
    save(folder, 3)
    assert len(calls) == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left, says zip")])
def test_a_full_disk_is_a_checkpoint_error(folder, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(checkpoints, "write_atomic", full)
    with pytest.raises(CheckpointError, match=r"could not be written: No space left"):
        save(folder, 3)
    assert step_of(folder.path) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_was_forked_holds_no_lock(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open_for_writing(resume=False)
    forked = os.fork()
    if not forked:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    other = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process writes"):
        other.open_for_writing(resume=True)
    folder.close()
    with closing(RunFolder(tmp_path / "run")) as again:
        again.open_for_writing(resume=True)
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)


def test_without_a_manifest_a_checkpoint_is_unverified(folder):
    assert doubts(folder.path, checkpoint_file(folder.path)) == ""
    (folder / MANIFEST).unlink()
    for asked in (folder.path, folder / LAST):
        assert "is unverified" in doubts(asked, checkpoint_file(asked))


@pytest.mark.parametrize(("damage", "why"), [(truncate, "is damaged"), (lambda f: f.unlink(), "is missing")])
def test_taking_the_checkpoint_before_is_said(folder, damage, why):
    damage(folder / LAST)
    said = doubts(folder.path, checkpoint_file(folder.path))
    assert f"{LAST} {why}" in said and said.endswith("of step 1")
    assert doubts(folder / PREVIOUS, checkpoint_file(folder / PREVIOUS)) == ""  # it was asked for


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (os.system, ("true",))

    torch.save({"global_step": 1, "x": Code()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.ckpt")


# -- metrics.csv ----------------------------------------------------------------------------------------------


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def test_metrics_append_and_new_ones_add_a_column(tmp_path):
    file = tmp_path / "metrics.csv"
    logger = MetricsLogger(file, tmp_path)
    logger.log_metrics({"loss": 2.5}, 0)
    logger.log_metrics({"loss": 1.25}, 1)
    logger.log_metrics({"f1": 0.1}, 1)
    assert rows(file) == [
        {"step": "0", "loss": "2.5", "f1": ""},
        {"step": "1", "loss": "1.25", "f1": ""},
        {"step": "1", "loss": "", "f1": "0.1"},
    ]


def test_a_resume_forgets_the_rows_that_will_come_again(tmp_path):
    file = tmp_path / "metrics.csv"
    logger = MetricsLogger(file, tmp_path)
    for step in range(6):
        logger.log_metrics({"loss": 1 / (step + 1), "x": step}, step)
    whole = file.read_bytes()
    again = MetricsLogger(file, tmp_path)
    again.forget_after(4)
    assert [row["step"] for row in rows(file)] == ["0", "1", "2", "3"]
    for step in (4, 5):
        again.log_metrics({"loss": 1 / (step + 1), "x": step}, step)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_row_cut_by_a_kill_is_dropped(tmp_path, cut):
    file = tmp_path / "metrics.csv"
    logger = MetricsLogger(file, tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 0.125, "x": step}, step)
    file.write_bytes(file.read_bytes()[:-cut])
    again = MetricsLogger(file, tmp_path)
    again.forget_after(2)
    assert [(r["step"], r["x"]) for r in rows(file)] == [("0", "0.0"), ("1", "1.0")]


def test_a_first_start_begins_an_empty_log(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.csv", tmp_path)
    logger.forget_after(0)
    assert rows(tmp_path / "metrics.csv") == []


# -- record and picture -----------------------------------------------------------------------------------------


def test_record_says_what_ran_on_what():
    record = new_record("fit", {"seed_everything": 3, "run_dir": "a"}, 3, ["--seed=3"])
    assert record["schema"] == SCHEMA
    assert record["state"] == "running"
    assert record["argv"] == ["astbench", "fit", "--seed=3"]
    assert record.keys() == {
        "schema", "command", "argv", "config", "config_hash", "seed", "started", "git", "versions", "hardware", "state"
    }  # fmt: skip
    assert {"python", "torch", "transformers", "lightning", "astbench"} <= record["versions"].keys()
    assert {"cpu", "cores", "threads", "memory_bytes"} <= record["hardware"].keys()
    json.dumps(record)


def test_config_hash_ignores_where_it_is_written_and_nothing_else():
    config = {"run_dir": "a", "attention": {"name": "ast", "density": 0.25}, "seed_everything": 0}
    assert config_hash({**config, "run_dir": "b", "loggers": ["csv"], "checkpoint_every": 3}) == config_hash(config)
    assert config_hash(dict(reversed(config.items()))) == config_hash(config)
    assert config_hash({**config, "seed_everything": 1}) != config_hash(config)
    assert config_hash({**config, "attention": {"name": "ast", "density": 0.5}}) != config_hash(config)


def stats_of(name, options):
    shape = AttentionShape(num_heads=2, num_kv_heads=1, head_dim=5)
    q, k, v = torch.randn(2, 2, 40, 5), torch.randn(2, 1, 40, 5), torch.randn(2, 1, 40, 5)
    attention = build_attention(name, options, shape)
    return attention(q, k, v, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True)).stats


@pytest.mark.parametrize("layers", [1, 11])
def test_picture_is_a_png(tmp_path, layers):
    stats = [(f"model.layers.{i}.self_attn", stats_of("ast", {"block_size": 4, "density": 0.3})) for i in range(layers)]
    causal = {path for path, _ in stats[::2]}
    assert draw_pattern(tmp_path / "pattern.png", stats, "ast", None, causal) == "pattern.png"
    assert (tmp_path / "pattern.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("queries", "keys", "group", "block"), [(10, 10, 1, 4), (10, 10, 4, 4), (37, 50, 8, 3)])
def test_grey_is_what_no_row_of_a_group_sees(queries, keys, group, block):
    offset = keys - queries
    groups = -(-keys // group) - offset // group
    keep = torch.ones(1, 1, groups, -(-keys // block), dtype=torch.bool)
    shape = {"query_length": queries, "key_length": keys, "query_offset": offset}
    layout = BlockLayout.from_mask(keep, block_size=block, query_group=group, **shape)
    seen = torch.zeros_like(keep[0, 0])
    for query, key in layout.token_mask(causal=True)[0, 0].nonzero().tolist():
        seen[(query + offset) // group - layout.first_group, key // block] = True
    assert torch.equal(picture._future(layout), ~seen)


def test_no_picture_without_blocks(tmp_path):
    assert draw_pattern(tmp_path / "pattern.png", [("a", stats_of("dense", {}))], "dense") is None
    assert list(tmp_path.iterdir()) == []


# -- a record while its run goes on --------------------------------------------------------------------------


@pytest.fixture
def open_folder(tmp_path):
    """A run folder that is closed in the end."""
    with closing(RunFolder(tmp_path / "run")) as folder:
        yield folder


def begun(folder, resume=False):
    folder.close()
    folder.open_for_writing(resume=resume)
    record = RunRecord(folder)
    record.begin("fit", {"seed_everything": 3}, ["--seed=3"], None, writer=True)
    return record


def stored(folder):
    return json.loads((folder / RECORD).read_text())


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NumericError("nan"), "diverged"),
        (Terminated("now"), "terminated"),
        (Interrupted("now"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (torch.OutOfMemoryError("full"), "out_of_memory"),
        (ValueError("else"), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_record_says_how_the_run_ended(open_folder, error, state):
    record = begun(open_folder)
    assert stored(open_folder)["state"] == "running"
    record.data["parameters"] = {}
    with pytest.raises(type(error)), record.recording():
        raise error
    assert stored(open_folder)["state"] == state
    assert stored(open_folder)["error"].startswith(type(error).__name__)


def test_what_is_refused_before_it_runs_leaves_nothing(open_folder):
    record = begun(open_folder)
    with pytest.raises(ValueError), record.recording():
        raise ValueError("no")
    assert not open_folder.path.exists()


def test_a_resumed_record_counts_the_time_before(open_folder):
    folder = open_folder
    begun(folder).trained(4)
    first = stored(folder)
    first["train"]["wall_seconds"] = 100.0
    write_json(folder / RECORD, first)
    again = begun(folder, resume=True)
    assert again.data["train"] == {"steps": 4, "wall_seconds": 100.0}
    again.trained(6)
    assert stored(folder)["train"]["steps"] == 6 and 100 <= stored(folder)["train"]["wall_seconds"] < 160
    assert [earlier["train"]["steps"] for earlier in stored(folder)["earlier"]] == [4]
    again.training_done(8, {"steps_timed": 2})
    assert again.data["train"].keys() == {"steps", "wall_seconds", "steps_timed"}


def test_steps_of_several_batches_are_timed_whole(monkeypatch):
    clock, now = StepClock(), iter([0.0, 0.003, 1.0, 1.001, 2.0, 2.002, 3.0, 3.004])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert clock.summary() == {"step_ms": None, "steps_timed": 0}
    for step in range(4):
        clock.start(step)
        clock.stop(step)  # a batch of the same step: nothing is timed
        clock.stop(step + 1)
    assert clock.summary() == {"step_ms": [1.75, 2.5, 3.25], "steps_timed": 4}
