"""The `astbench` command: what it can do, and how it ends. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from astbench.cli.commands.names import LIGHTNING, OWN
from astbench.errors import AstbenchError, Stopped, Terminated

USAGE = """usage: astbench COMMAND [options]

{commands}

first run:    astbench fit --attention=ast --task=triviaqa
then:         astbench list
              astbench fit --help
exit codes:   0 done, 2 usage or config, 3 data, 4 unknown name or plugin, 5 not finite, 6 checkpoint,
              7 environment, 130 interrupted, 143 terminated; a traceback only with --debug
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(words)
    except (AstbenchError, Stopped) as error:
        if debug:
            traceback.print_exc()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of a run's processes would only repeat it
            print(f"astbench: error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`astbench list | head`): not an error, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("astbench: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = _known(error)
        where = "" if known else " (unexpected; --debug shows where)"
        print(
            f"astbench: error: {type(error).__name__ + ': ' if not known else ''}{_one_line(error)}{where}",
            file=sys.stderr,
        )
        return known or 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        names = {**LIGHTNING, **OWN}
        print(USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, text in names.items())), end="")
        return 0
    if words[0] in ("-V", "--version"):
        from astbench import __version__

        print(f"astbench {__version__}")
        return 0
    command, rest = words[0], [w for w in words[1:] if w != "--debug"]
    if command in LIGHTNING:
        from astbench.cli.commands.train import run

        return run(command, words[1:])
    if command in OWN:
        from importlib import import_module

        return int(import_module(f"astbench.cli.commands.{command}").run(rest))
    from astbench.cli.messages import nearest
    from astbench.errors import ConfigError

    raise ConfigError(f"unknown command '{command}'{nearest(command, [*LIGHTNING, *OWN])}; see astbench --help")


def _known(error: Exception) -> int:
    """Exit code of errors that other floors and libraries raise for users; 0 for surprises."""
    from astbench_registry import CapabilityError, RegistryError

    if isinstance(error, RegistryError):
        return 4
    if isinstance(error, CapabilityError | ValueError):
        return 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 7
    return 0


def _one_line(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return " ".join([*str(error).split(), *(f"({note})" for note in notes)])


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated("terminated by SIGTERM")
