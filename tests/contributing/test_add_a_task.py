"""The checklist "Add a task"."""

import re

import torch

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

SMALL = ["--trainer.max_steps=4", "--data.num_eval=8", "--data.batch_size=4"]


def test_as_your_own_file(tree, guide):
    (tree.cwd / "majority.py").write_text(guide.example("task"))
    assert guide.stated("task")[0] == len(list(tree.cwd.iterdir()))
    plugin = "--plugins=./majority.py"
    fit = ["fit", "--attention=ast", *SMALL]
    listed, whole, stopped, untrusted, resumed, tested = tree.run(
        ["list", plugin],
        [*fit, "--task=./majority.py:Majority", "--run_dir=whole"],
        [*fit, "--task=majority", plugin, "--run_dir=stopped"],
        ["fit", "--resume=stopped"],
        ["fit", "--resume=stopped", plugin],
        ["test", "--ckpt_path=stopped", plugin, "--data.num_eval=4", "--run_dir=tested"],
        before=STOP,
    )
    guide.succeed([listed, whole, resumed, tested])
    assert "(accuracy) [sources: generated] [./majority.py]" in listed.out
    assert stopped.code == 143 and "--resume=stopped --plugins=./majority.py" in stopped.err
    assert untrusted.code == 2 and "add --plugins=./majority.py" in untrusted.err
    weights = [
        torch.load(tree.cwd / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "stopped")
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert re.search(r"accuracy +\d", tested.out)


def test_in_this_repository(tree, guide):
    code = guide.example("task")
    decorator = re.search(r"^@register_task\(\n.*?^\)\n", code, re.M | re.S)
    code = code.replace(decorator[0], "").replace("from astbench.tasks import register_task\n", "")
    tree.follow("task", majority=code)
    assert guide.stated("task")[1] == len(tree.touched)
    listed, _, _ = guide.succeed(
        tree.run(
            ["list"],
            ["fit", "--config=recipes/demo/majority.yaml", *SMALL, "--run_dir=run"],
            ["pytest", "tests/astbench/tasks/test_majority.py"],
        )
    )
    assert "majority      Which of two symbols is in the majority (accuracy) [sources: generated]\n" in listed
    assert (tree.cwd / "run" / "done.json").exists()
