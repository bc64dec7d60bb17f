"""What ends a run: one clear line and an exit code. Tracebacks only with `--debug`. Imports nothing heavy."""

import errno
import os
import re


class AstbenchError(Exception):
    """Base; `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(AstbenchError):
    """An option, a value or a combination that cannot work."""

    exit_code = 2


class DataError(AstbenchError):
    """A data source that is missing, damaged or empty."""

    exit_code = 3


class NameOrPluginError(AstbenchError):
    """An unknown attention or task, or a plugin that does not load."""

    exit_code = 4


class NumericError(AstbenchError):
    """A loss or gradient that is no longer a number."""

    exit_code = 5


class CheckpointError(AstbenchError):
    """A checkpoint that is missing, damaged or belongs to other options."""

    exit_code = 6


class MissingPackageError(AstbenchError):
    """The environment lacks something: a package, a device, a backend."""

    exit_code = 7


class SystemRefusal(AstbenchError):
    """The system gives no more: a full disk, no memory, too many open files, no rights, a folder that is gone."""

    exit_code = 7


class UnwrittenCheckpoint(CheckpointError, SystemRefusal):
    """A checkpoint that the system did not let us write."""

    exit_code = 7


class Stopped(BaseException):
    """A signal arrived. Like KeyboardInterrupt no Exception: nothing that reports failures may take it for one."""

    exit_code = 1


class Terminated(Stopped):
    """SIGTERM arrived."""

    exit_code = 143


class Interrupted(Stopped):
    """Ctrl-C (SIGINT) arrived."""

    exit_code = 130


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space, or name another with --run_dir=FOLDER",
    errno.EDQUOT: "the disk quota is used up; free some space, or name another with --run_dir=FOLDER",
    errno.EFBIG: "files may not be that large here (ulimit -f)",
    errno.EMFILE: "too many files are open; raise ulimit -n, or lower --data.num_workers",
    errno.ENFILE: "too many files are open on this machine; lower --data.num_workers",
    errno.EACCES: "no rights to it",
    errno.EPERM: "no rights to it",
    errno.EROFS: "it is on a read-only file system; name another folder with --run_dir=FOLDER",
    errno.ENOENT: "it is gone; was its folder deleted?",
    errno.ENOTDIR: "its folder is gone; was it deleted?",
    errno.ENOMEM: "the memory is used up; lower --data.batch_size",
}

_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "insufficient shared memory",
    "bad_alloc",
)
_NO_THREADS = "can't start new thread"
_NO_FILES = ("too many open files", "received 0 items of ancdata")

_OF_RUST = re.compile(r"\(os error (\d+)\)$")
"""How the tokenizers package ends what the system told it, in a plain Exception."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in several ways."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


def refused_by_system(error: BaseException) -> AstbenchError | None:
    """An error of Python or torch as what it means to the user; None where the system refused nothing."""
    if isinstance(error, SystemRefusal):
        return error
    if _refused_name(error):
        # What was typed is checked where it is read; such names come from files of data.
        return DataError(f"a name that the system refuses: {' '.join(ascii(str(error)).split())[1:-1][:300]}")
    if out_of_memory(error):
        where = "GPU" if "cuda" in str(error).lower() or "hip" in str(error).lower() else "CPU"
        return SystemRefusal(f"out of memory on the {where}; lower --data.batch_size, or the length of the inputs")
    if isinstance(error, RuntimeError) and _NO_THREADS in str(error):
        return SystemRefusal("no more threads can be started: memory, or ulimit -u, is used up")
    if isinstance(error, RuntimeError | ImportError) and any(text in str(error).lower() for text in _NO_FILES):
        return SystemRefusal(_ADVICE[errno.EMFILE])
    if type(error) is Exception and (found := _OF_RUST.search(str(error))):
        error = OSError(int(found[1]), "")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    what = ascii(os.fsdecode(error.filename))[1:-1][:300] if isinstance(error.filename, str | bytes) else ""
    reason = _ADVICE.get(error.errno, f"{os.strerror(error.errno)}")
    return SystemRefusal(f"{what}: {reason}" if what else reason)


def _refused_name(error: BaseException) -> bool:
    """Whether a file's name is too long, holds NUL or half a surrogate pair, or leads around in circles."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    text = str(error)
    return (
        isinstance(error, UnicodeEncodeError)
        or (isinstance(error, ValueError) and "embedded null" in text)
        or (isinstance(error, RuntimeError) and text.startswith("Symlink loop"))
    )
