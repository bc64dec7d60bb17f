"""The command line: names first, without torch; then one parser of exactly those classes; then one run.

`astbench.cli:main` is what the console script calls.
"""

from astbench.cli.main import main

__all__ = ["main"]
