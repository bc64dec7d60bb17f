"""The parser of commands that have a few options of their own. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import NoReturn

from astbench.errors import ConfigError


class OwnParser(argparse.ArgumentParser):
    """`astbench NAME`, whose mistakes end as all others do; help is the command's own text."""

    def __init__(self, name: str) -> None:
        super().__init__(prog=f"astbench {name}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """See the base class.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}")
