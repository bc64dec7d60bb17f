"""`astbench fit|validate|test|predict`: names first, then one LightningCLI for exactly those classes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from astbench.cli.commands.names import LIGHTNING
from astbench.cli.names import check_names, read_names
from astbench.cli.processes import check_interpreter, drop_strays
from astbench.tasks import registered_tasks
from astbench_registry import registered
from astbench_registry.depth.registry import registered_depths
from astbench_registry.transforms.registry import registered_transforms


def run(command: str, words: list[str]) -> int:
    """Run one Lightning subcommand. Without both names, `--help` needs no torch."""
    line = read_names(words)
    if line.help and (line.attention is None or line.task is None):
        print(_overview(command))
        return 0
    check_names(line)
    check_interpreter()
    drop_strays()
    # The heavy imports start here, when everything that needs no torch has been checked.
    with _no_collection():
        from astbench.cli.lightning import run as run_lightning

    return run_lightning(command, line)


@contextmanager
def _no_collection() -> Iterator[None]:
    """The garbage collector stands still while modules are read, and leaves what they made alone afterwards.

    They make a million objects that stay. To look at those again and again took a quarter of the imports' time.
    """
    if not gc.isenabled() or "astbench.cli.lightning" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def _overview(command: str) -> str:
    attentions = "\n".join(f"  {row.name:<13} {row.summary}" for row in registered().values())
    transforms, depths = ", ".join(registered_transforms()), ", ".join(registered_depths())
    tasks = "\n".join(f"  {task.name:<13} {task.summary}" for task in registered_tasks().values())
    return f"""usage: astbench {command} --attention=NAME --task=NAME [options]

{LIGHTNING[command]}

attentions (options: astbench describe NAME)
{attentions}

tasks
{tasks}

options, all of them with their help: astbench {command} --attention=NAME --task=NAME --help
  --backbone=NAME         preset, folder with pretrained weights, or Hugging Face name
  --data.source=SOURCE    where the data comes from; --data.path=... for local files
  --trainer.max_steps=N   and everything else of Lightning's Trainer under --trainer.
  --optim.lr=X            learning rate and schedule
  --seed=N                weights, data order and every random draw
  --config=FILE           YAML with any of these; a run's config.yaml runs again
  --run_dir=FOLDER        where the run is kept; default runs/TASK-ATTENTION-TIME
  --resume=FOLDER         go on with a run that was stopped (fit)
  --ckpt_path=FOLDER      a run, or its checkpoint, to evaluate (validate, test, predict)
  --init_from=FOLDER      start from the trained weights of another run
  --transform=NAME        change attention weights before they sum values (validate, test, predict): {transforms}
  --depth=NAME            choose for each input which layers run: {depths}
  --plugins=FILE|MODULE   attentions, transforms, depth policies and tasks of your own; also --attention=./mine.py:Mine
  --print_config          print the resolved options and stop
  --trust_config          let configs name code: plugins, classes of files, any callback
  --debug                 show tracebacks"""
