"""`astbench deploy-test RECIPE.yaml`: attentions behind `astbench serve` in turn, under the same load."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from astbench.cli.own_parser import OwnParser
from astbench.errors import MissingPackageError

_USAGE = """usage: astbench deploy-test RECIPE.yaml [--plan] [options]

Serves the same model with one attention after another through `astbench serve`, sends each the same requests at the
same random times, at several lengths and rates, and keeps a record of every cell. What is measured stays: a second
start does what is left. At the end it draws curves; `astbench table` shows the tables.

  RECIPE.yaml        what is served and which load comes; see docs/deploy.md
  --plan             say which cells there are and how far they are, and stop
  --retry            try again what failed
  --plugins FILE     attentions of your own, for every server; may be given several times

A stop (Ctrl-C, SIGTERM) stops the server too. Exit codes: 0 every cell is done or past the knee, 1 not every one."""


def run(words: list[str]) -> int:
    """Run a recipe, or show its plan."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    from astbench.deploy.recipe import read_recipe
    from astbench.tasks import load_plugin

    for plugin in given.plugins:
        load_plugin(plugin)
    recipe = read_recipe(given.recipe)
    if not given.plan and find_spec("aiohttp") is None:
        raise MissingPackageError("astbench deploy-test needs aiohttp: pip install 'astbench[serve,loadtest]'")
    if given.plan:
        from astbench.deploy.plan import plan, show

        show(recipe, plan(recipe))
        return 0
    from astbench.deploy.run import run as start

    return start(recipe, words, retry=given.retry, plugins=given.plugins)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("deploy-test")
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--plugins", action="append", default=[])
    return parser.parse_args(words)
