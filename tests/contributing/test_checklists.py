"""The checklists of CONTRIBUTING.md, followed to the letter: all plugins in one process, all changes to one tree."""

import re

import pytest
import torch
import yaml

from tests.contributing.following import Run, Tree, example, stated, succeed

STOP = """
import os, signal
from astbench.training.module import TaskModule
begin, stops = TaskModule.on_train_batch_start, [2]
def stopping(self, batch, batch_idx):
    begin(self, batch, batch_idx)
    if str(self.trainer.default_root_dir).endswith("stopped") and [self.global_step] == stops:
        os.kill(os.getpid(), signal.SIGTERM)
        stops.clear()
TaskModule.on_train_batch_start = stopping
"""
"""SIGTERM in the middle of a step, once."""

MAJORITY = ["--trainer.max_steps=4", "--data.num_eval=8", "--data.batch_size=4"]
QUESTIONS = [
    "--trainer.max_steps=2",
    "--data.demo_train=64",
    "--data.demo_eval=8",
    "--data.max_length=128",
    "--data.stride=32",
    "--data.max_question=32",
    "--data.batch_size=4",
]
"""A fit of seconds of either task."""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """Files beside the tree, and what the commands make of them."""
    run = Run(Tree(tmp_path_factory.mktemp("plugins")))
    (run.tree.cwd / "relu.py").write_text(example("example"))
    (run.tree.cwd / "majority.py").write_text(example("task"))
    (run.tree.cwd / "power.py").write_text(example("transform"))
    (run.tree.cwd / "by_length.py").write_text(example("depth"))
    fit, task = ["fit", "--attention=ast", *MAJORITY], "--plugins=./majority.py"
    return run.start(
        {
            "checked": ["check", "relu", "--plugins=./relu.py"],
            "listed": ["list", "--plugins=./relu.py", task],
            "whole": [*fit, "--task=./majority.py:Majority", "--run_dir=whole"],
            "stopped": [*fit, "--task=majority", task, "--run_dir=stopped"],
            "untrusted": ["fit", "--resume=stopped"],
            "resumed": ["fit", "--resume=stopped", task],
            "tested": ["test", "--ckpt_path=stopped", task, "--data.num_eval=4", "--run_dir=tested"],
            "transform checked": ["check", "power", "--plugins=./power.py"],
            "transform described": ["describe", "power", "--plugins=./power.py"],
            "transformed": [
                "test",
                "--ckpt_path=stopped",
                task,
                "--data.num_eval=4",
                "--transform=./power.py:Power",
                "--transform.power=0.5",
                "--run_dir=transformed",
            ],
            "depth checked": ["check", "by_length", "--plugins=./by_length.py"],
            "depth described": ["describe", "by_length", "--plugins=./by_length.py"],
            "deep": [*fit, "--task=majority", task, "--depth=./by_length.py:ByLength", "--run_dir=deep"],
        },
        before=STOP,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """One tree with every change in it, and what the commands make of it."""
    run = Run(Tree(tmp_path_factory.mktemp("changes")))
    code = example("task")
    decorator = re.search(r"^@register_task\(\n.*?^\)\n", code, re.M | re.S)
    code = code.replace(decorator[0], "").replace("from astbench.tasks import register_task\n", "")
    for kind in ("variant", "task", "transform", "policy", "backend", "command", "recipe"):
        run.tree.follow(kind, majority=code)
    run.tree.lint(
        "variant", "transform", "policy", "backend", "command"
    )  # the task lacks docstrings, as its checklist says
    (recipe,) = run.tree.touched["recipe"]
    return run.start(
        {
            "help": ["--help"],
            "listed": ["list"],
            "variant checked": ["check", "zero_sink"],
            "variant": ["fit", "--config=recipes/demo/zero_sink.yaml", *QUESTIONS, "--run_dir=variant"],
            "variant's test": ["pytest", "tests/registry/variants/test_zero_sink.py"],
            "task": ["fit", "--config=recipes/demo/majority.yaml", *MAJORITY, "--run_dir=task"],
            "task's test": ["pytest", "tests/astbench/tasks/test_majority.py"],
            "transform checked": ["check", "binary"],
            "transform's test": ["pytest", "tests/registry/transforms/test_binary.py"],
            "transform's recipe": ["test", "--config=recipes/wikitext2/smollm2-binary.yaml", "--print_config"],
            "depth checked": ["check", "every_nth"],
            "depth's test": ["pytest", "tests/registry/depth/test_every_nth.py"],
            "depth's recipe": ["fit", "--config=recipes/demo/every_nth.yaml", "--print_config"],
            "doctor": ["doctor"],
            "backend checked": ["check", "random_topk", "--attention.backend=by_sequence"],
            "backend described": ["describe", "random_topk", "--attention.backend=by_sequence"],
            "backend's test": ["pytest", "tests/kernels/backends/test_by_sequence.py"],
            "command's help": ["preset", "--help"],
            "command": ["preset", "llama-tiny"],
            "command's test": ["pytest", "tests/astbench/cli/test_preset.py"],
            "recipe resolved": ["fit", f"--config={recipe}", "--print_config"],
            "recipe": ["fit", f"--config={recipe}", "--trainer.max_steps=1", "--data.num_eval=4", "--run_dir=recipe"],
        }
    )


def test_a_variant_as_your_own_file(plugins):
    assert stated("variant")[0] == 1
    assert " 0 failed" in succeed(plugins["checked"])
    assert "[./relu.py]" in succeed(plugins["listed"])


def test_a_task_as_your_own_file(plugins):
    assert stated("task")[0] == 1
    assert "(accuracy) [sources: generated] [./majority.py]" in succeed(plugins["listed"])
    assert plugins["stopped"].code == 143 and "--resume=stopped --plugins=./majority.py" in plugins["stopped"].err
    assert plugins["untrusted"].code == 2 and "add --plugins=./majority.py" in plugins["untrusted"].err
    for name in ("whole", "resumed"):
        succeed(plugins[name])
    runs = [plugins.tree.cwd / run / "last.ckpt" for run in ("whole", "stopped")]
    torch.testing.assert_close(*(torch.load(run, weights_only=True)["state_dict"] for run in runs), rtol=0, atol=0)
    assert re.search(r"accuracy +\d", succeed(plugins["tested"]))


def test_a_variant_in_this_repository(tree):
    assert stated("variant")[1] == len(tree.tree.touched["variant"])
    listed = succeed(tree["listed"])
    assert "zero_sink" in listed and "Xiao et al. 2023" in listed
    assert " 0 failed" in succeed(tree["variant checked"])
    succeed(tree["variant"])
    succeed(tree["variant's test"])
    assert (tree.tree.cwd / "variant" / "done.json").exists()


def test_a_task_in_this_repository(tree):
    assert stated("task")[1] == len(tree.tree.touched["task"])
    line = "majority      Which of two symbols is in the majority (accuracy) [sources: generated]\n"
    assert line in succeed(tree["listed"])
    succeed(tree["task"])
    succeed(tree["task's test"])
    assert (tree.tree.cwd / "task" / "done.json").exists()


def test_a_transform_as_your_own_file(plugins):
    assert stated("transform")[0] == 1
    assert " 0 failed" in succeed(plugins["transform checked"])
    assert "power                float" in succeed(plugins["transform described"])
    assert re.search(r"transform +power in \d layers power=0.5", succeed(plugins["transformed"]))


def test_a_transform_in_this_repository(tree):
    assert stated("transform")[1] == len(tree.tree.touched["transform"])
    assert "  binary        Attention weights of two values" in succeed(tree["listed"])
    assert " 0 failed" in succeed(tree["transform checked"])
    succeed(tree["transform's test"])
    assert yaml.safe_load(succeed(tree["transform's recipe"]))["transform"]["threshold"] == 0.001


def test_a_depth_policy_as_your_own_file(plugins):
    assert stated("policy")[0] == 1
    assert " 0 failed" in succeed(plugins["depth checked"])
    assert "short                int" in succeed(plugins["depth described"])
    assert re.search(r"depth +by_length over \d layers short=16 layers=2", succeed(plugins["deep"]))


def test_a_depth_policy_in_this_repository(tree):
    assert stated("policy")[1] == len(tree.tree.touched["policy"])
    assert "  every_nth     The first layer and every n-th after it." in succeed(tree["listed"])
    assert " 0 failed" in succeed(tree["depth checked"])
    succeed(tree["depth's test"])
    assert yaml.safe_load(succeed(tree["depth's recipe"]))["depth"]["n"] == 2


def test_a_backend(tree):
    assert stated("backend") == (None, len(tree.tree.touched["backend"]))
    assert "yes by_sequence      the oracle, one sequence after the other" in succeed(tree["doctor"])
    assert " 0 failed" in succeed(tree["backend checked"])
    assert "here 'by_sequence'" in succeed(tree["backend described"])
    succeed(tree["backend's test"])


def test_a_command(tree):
    assert stated("command") == (None, len(tree.tree.touched["command"]))
    listed = [line.split(maxsplit=1) for line in succeed(tree["help"]).splitlines()]
    assert ["preset", "the Hugging Face configuration of a backbone preset"] in listed
    assert succeed(tree["command's help"]) == "usage: astbench preset NAME\n"
    assert "hidden_size                  64" in succeed(tree["command"])
    succeed(tree["command's test"])


def test_a_recipe(tree):
    (recipe,) = tree.tree.touched["recipe"]
    assert stated("recipe") == (1, 1)
    resolved = yaml.safe_load(succeed(tree["recipe resolved"]))
    for group, options in yaml.safe_load((tree.tree.root / recipe).read_text()).items():
        assert options.items() <= resolved[group].items()
    succeed(tree["recipe"])
    assert (tree.tree.cwd / "recipe" / "done.json").exists()
