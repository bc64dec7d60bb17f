"""`astbench run SWEEP.yaml`: many runs from one file, each once; a second start does what is left."""

from __future__ import annotations

import argparse
from pathlib import Path

from astbench.cli.own_parser import OwnParser
from astbench.errors import ConfigError

_USAGE = """usage: astbench run SWEEP.yaml [--plan] [options]

Runs every combination of a sweep's values as a command of its own. What is finished stays, what was stopped goes on,
and what failed is kept with its reason. A second start does what is left.

  SWEEP.yaml         command, config, folder, options, axes, exclude and profiles; see docs/sweeps.md
  --plan             say what would run, how far it is and what it takes, and stop
  --profile NAME     one of the file's profiles; needed where it has some
  --jobs N           cells at a time; on this machine they share its cores and GPUs (default: 1)
  --launcher NAME    who runs them: local, slurm (through submitit) or ray; their options stand in SWEEP.yaml
                     under slurm and ray (default: local)
  --retry            try again what failed; its folders move to failed/
  --plugins FILE     attentions and tasks of your own, for every cell; may be given several times
  --results FOLDER   records from which times are estimated (default: results)

A stop (Ctrl-C, SIGTERM) stops the cells, which save first. Exit codes: 0 every cell is done, 1 not every one."""


def run(words: list[str]) -> int:
    """Run a sweep, or show its plan."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    if given.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {given.jobs}")
    from astbench.sweeps.spec import read_sweep
    from astbench.tasks import load_plugin

    sweep = read_sweep(given.sweep, given.profile)
    for plugin in given.plugins:
        load_plugin(plugin)
    from astbench.sweeps import run as runner  # imports Lightning, for the defaults of its options

    if given.plan:
        planned, notes, _ = runner.plan(sweep, given.results)
        runner.show(sweep, planned, notes, given.jobs)
        return 0
    return runner.run(
        sweep,
        jobs=given.jobs,
        retry=given.retry,
        plugins=given.plugins,
        results=given.results,
        launcher=given.launcher,
    )


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("run")
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--profile")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--launcher", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--plugins", action="append", default=[])
    parser.add_argument("--results", type=Path, default=Path("results"))
    return parser.parse_args(words)
