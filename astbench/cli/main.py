"""The `astbench` command: what it can do, and how it ends. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from astbench import console
from astbench.cli.allocator import keep_freed_memory
from astbench.cli.commands.names import LIGHTNING, OWN
from astbench.cli.processes import is_child
from astbench.cli.stopping import SIGNALS
from astbench.errors import AstbenchError, ConfigError, Interrupted, Stopped, refused_by_system

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
    keep_freed_memory()
    console.open_streams()
    with SIGNALS.listening():
        try:
            code = _dispatch(words)
            sys.stdout.flush()
            return code
        except SystemExit as error:
            if SIGNALS.number is None and any(map(_asks, words)):
                _flush()
                raise
            return _ended(error, words)
        except BaseException as error:  # a plugin may raise anything
            return _ended(error, words)


def _asks(word: str) -> bool:
    """Whether an option asks for what jsonargparse prints before it ends the process by itself."""
    option = word.partition("=")[0]
    return option == "-h" or option.startswith("--print_config") or option.endswith("help")


def _flush() -> None:
    """Write what was printed, if anybody reads it."""
    try:
        sys.stdout.flush()
    except OSError:
        console.drop(sys.stdout)


def _ended(error: BaseException, words: list[str]) -> int:
    """Say in one line what ended the command; the exit code."""
    if isinstance(error, OSError):
        console.drop(sys.stdout)  # if it is what failed, it would fail again
        if isinstance(error, BrokenPipeError) and not {*words[:1]} & {*LIGHTNING, "bench"}:
            return 0  # the reader of our output has gone (`astbench list | head`), and there is nobody to tell
    stopped = _stopped(error)
    if "--debug" in words:
        traceback.print_exception(error)
    if stopped is not None:
        if not is_child():  # the others of a run's processes would only repeat it
            console.tell(f"astbench: error: {_one_line(stopped)}")
        return stopped.exit_code
    code, text = _told(error)
    console.tell(f"astbench: error: {text}")
    return code


def _stopped(error: BaseException) -> Stopped | None:
    """The signal that ended the command, whatever a library has made of it; None for none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Stopped):
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    return SIGNALS.error() if SIGNALS.number is not None and not isinstance(error, AstbenchError) else None


def _dispatch(words: list[str]) -> int:
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"an argument is not valid UTF-8, and no record could hold it: {word!r}")
    if not words or words[0] in ("-h", "--help", "help"):
        names = {**LIGHTNING, **OWN}
        print(USAGE.format(commands="\n".join(f"  {name:<11} {text}" for name, text in names.items())), end="")
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

        return int(import_module(f"astbench.cli.commands.{command.replace('-', '_')}").run(rest))
    from astbench.cli.messages import nearest

    raise ConfigError(f"unknown command '{command}'{nearest(command, [*LIGHTNING, *OWN])}; see astbench --help")


def _told(error: BaseException) -> tuple[int, str]:
    """Exit code and text of an error, our own, other floors' and libraries' for users, or a surprise."""
    from astbench_registry import CapabilityError, RegistryError

    if isinstance(error, AstbenchError):
        return error.exit_code, _one_line(error)
    if isinstance(error, SystemExit):
        return 1, f"something called exit({error.code})"
    if isinstance(error, RegistryError):
        return 4, _one_line(error)
    if refusal := refused_by_system(error):
        return refusal.exit_code, _one_line(refusal)
    if isinstance(error, CapabilityError | ValueError):
        return 2, _one_line(error)
    return 1, f"{type(error).__name__}: {_one_line(error)[:1000]} (unexpected; --debug shows where)"


def _one_line(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return " ".join([*str(error).split(), *(f"({note})" for note in notes)])
