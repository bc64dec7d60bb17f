"""A cell's process: it is asked to stop when the sweep that started it is gone, however that went.

`python -m astbench.sweeps.child PARENT COMMAND ...` becomes `python -m astbench COMMAND ...`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

COMMAND = (sys.executable, "-m", "astbench")

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command; where the system has no such request (it is Linux's), the cell runs on to its end."""
    parent, words = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it went before the request was made
            sys.exit(128 + signal.SIGTERM)
    os.execv(COMMAND[0], [*COMMAND, *words])


if __name__ == "__main__":
    main()
