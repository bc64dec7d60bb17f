"""Configs that explode and numbers that nobody can mean: refused soon, in little memory."""

import time

import pytest

from astbench.cli.config_files import read_config
from astbench.errors import ConfigError
from tests.astbench.cli.commands import FIT
from tests.astbench.cli.test_cli import assert_refused

LAUGHS = "a0: &a0 [" + ",".join(["lol"] * 10) + "]\n"
LAUGHS += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
MERGES = "a0: &a0 {x: 1, y: 2}\n"
MERGES += "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))
BOMBS = {
    "laughs": LAUGHS,
    "merges": MERGES,
    "lists": "optim: " + "[" * 10_000 + "]" * 10_000,
    "maps": "optim: " + "{a: " * 100_000,
    "dashes": "- " * 10_000,
    "itself": "optim: &a [*a]",
    "long": "optim: {" + ", ".join(f"a{i}: 1" for i in range(100_000)) + "}",
    "digits": f"seed: {'9' * 10_000}",
    "date": "optim: {lr: 2026-13-45}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_config_that_explodes_is_refused_soon(tmp_path, bomb):
    (tmp_path / "c.yaml").write_text(BOMBS[bomb])
    began = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(str(tmp_path / "c.yaml"))
    assert time.monotonic() - began < 20


def test_a_config_without_an_end_is_refused(astbench):
    assert_refused(astbench(*FIT, "--config=/dev/zero"), 2, "--config=/dev/zero cannot be read")


HUGE = [
    ("--data.vocab_size=1000000000000", "--data.vocab_size must be at most"),
    ("--data.num_workers=1000000", "--data.num_workers must be at most 256"),
    ("--data.batch_size=1000000000000", "--data.batch_size must be at most"),
    ("--data.max_length=1000000000000", "--data.max_length must be at most"),
    ("--attention.block_size=1000000", "--attention.block_size must be at most"),
    ("--attention.top_k=1000000000000", "--attention.top_k must be at most"),
    (f"--trainer.accumulate_grad_batches={2**64}", "--trainer.accumulate_grad_batches must be below 2**63"),
    (f"--trainer.max_steps={10**30}", "--trainer.max_steps must be below 2**63"),
    ("--optim.lr=.inf", "--optim.lr must be above 0, got inf"),
    ("--trainer.gradient_clip_val=.inf", "--trainer.gradient_clip_val must be a finite number"),
    ("--attention.density=.nan", "--attention.density must be a finite number"),
    ("--attention.distill_weight=.inf", "--attention.distill_weight must be a finite number"),
]


@pytest.mark.parametrize(("word", "part"), HUGE)
def test_numbers_that_nobody_can_mean_are_refused(astbench, tmp_path, word, part):
    assert_refused(astbench(*FIT, word, f"--run_dir={tmp_path / 'run'}"), 2, part)
    assert not (tmp_path / "run").exists()


def test_a_callbacks_numbers_are_finite_too(astbench, tmp_path):
    callback = "{class_path: EarlyStopping, init_args: {monitor: train/loss, min_delta: .nan}}"
    (tmp_path / "c.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}\n")
    outcome = astbench(*FIT, f"--config={tmp_path / 'c.yaml'}", f"--run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 2, "min_delta must be a finite number, got nan")


def test_check_and_bench_refuse_them_too(astbench, tmp_path):
    run_dir = f"--run_dir={tmp_path / 'run'}"
    assert_refused(astbench("check", "ast", "--attention.block_size=1000000"), 2, "block_size must be at most")
    assert_refused(astbench("check", "ast", "--attention.density=.inf"), 2, "must be a finite number")
    assert_refused(astbench("bench", "--rounds=9223372036854775807", run_dir), 2, "--rounds must be at most")
    assert_refused(astbench("bench", "--max_seconds=.inf", run_dir), 2, "--max_seconds must be a finite number")
    options = "--options={ast: {block_size: 1000000}}"
    assert_refused(astbench("bench", "--attention=ast", options, run_dir), 2, "block_size must be at most")
