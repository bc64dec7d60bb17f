"""What ends a run: one clear line and an exit code. Tracebacks only with `--debug`."""


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


class Stopped(BaseException):
    """A signal arrived. Like KeyboardInterrupt no Exception: nothing that reports failures may take it for one."""

    exit_code = 1


class Terminated(Stopped):
    """SIGTERM arrived."""

    exit_code = 143


class Interrupted(Stopped):
    """Ctrl-C (SIGINT) arrived."""

    exit_code = 130
