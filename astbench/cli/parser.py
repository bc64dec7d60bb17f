"""The second phase's argument parser: what a config may name, and errors in one line."""

from __future__ import annotations

import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from astbench.cli.messages import explain, nearest
from astbench.errors import ConfigError

ALLOWED = ["astbench", "astbench_registry", "torch.optim", "lightning.pytorch", "pytorch_lightning"]
"""What a config may name by `class_path`; naming a class imports and builds it."""

FLAGS = """
--trainer.*: everything of lightning.pytorch.Trainer
--seed=N: weights, data order and every random draw; the same as --seed_everything
--resume=FOLDER: go on with a run that was stopped (fit)
--trust_config: let configs name code: plugins, classes of files, any callback
--debug: show tracebacks
"""
"""What the help adds: options that are taken before this parser, or that stand for many."""


class Parser(LightningArgumentParser):
    """Errors in one line with the nearest option; `--help` leaves the Trainer's hundred options out."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise :class:`ConfigError` instead of printing the usage."""
        raise ConfigError(self._explain(" ".join(message.split()))) from ex

    def _explain(self, message: str) -> str:
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            return (
                f"a config may not name {denied[1]}: naming a class imports and builds it; allowed are "
                f"{', '.join(ALLOWED)}; --trust_config lifts this for configs you trust"
            )
        marker = "nrecognized arguments:"
        if marker not in message:
            return explain(message)
        words = message.partition(marker)[2].split()
        known = self._options()
        tips = [w + nearest(w.split("=")[0], known) for w in words if w.startswith("-")]
        return f"unknown option {', '.join(tips or words)}"

    def _options(self) -> list[str]:
        parsers = [self, *self._subcommand_parsers()]
        return [o for p in parsers for a in p._actions for o in a.option_strings]

    def _subcommand_parsers(self) -> list[Any]:
        action = getattr(self, "_subcommands_action", None)
        return list(action._name_parser_map.values()) if action else []

    def format_help(self, *arguments: Any) -> str:
        """Help without the Trainer's group of a hundred options."""
        kept = [g for g in self._action_groups if not (g.title or "").startswith("Customize every aspect")]
        groups, self._action_groups = self._action_groups, kept
        try:
            return super().format_help(*arguments) + FLAGS
        finally:
            self._action_groups = groups
