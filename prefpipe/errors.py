"""The error tree: every failure a user can cause or meet, with its exit code.

PrefpipeError                 1   anything else
  UsageError                  2   bad flag, recipe, name or value; OUT belongs to another config
  StrictError                 3   a check that the user made strict failed (STOP rule)
  DataError                  65   bad or corrupt data, or no row survives
  MissingInputError          66   an input is not there
  StorageError               74   I/O error, disk full
  LockedError                75   another process holds OUT
  IdentityError              76   cache or model does not belong here (identity, audit)
  Interrupted           130/143   SIGINT / SIGTERM after a clean stop, resumable
"""


class PrefpipeError(Exception):
    """What happened (with the value and the place), and what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PrefpipeError):
    """A bad flag, recipe, name or value, or an output directory that belongs to another config."""

    exit_code = 2


class StrictError(PrefpipeError):
    """A check that the user made strict failed; what was done up to it is kept."""

    exit_code = 3


class DataError(PrefpipeError):
    """Bad or corrupt data, or no row survives."""

    exit_code = 65


class MissingInputError(PrefpipeError):
    """A file, directory, model or package that the command needs is not there."""

    exit_code = 66


class StorageError(PrefpipeError):
    """The operating system refused a read or a write: disk full, permissions, I/O error."""

    exit_code = 74


class LockedError(PrefpipeError):
    """Another process is writing to this output directory."""

    exit_code = 75


class IdentityError(PrefpipeError):
    """A cached value or a model does not belong to what is being run."""

    exit_code = 76


class Interrupted(BaseException):
    """A signal asked the command to stop; committed work is kept and the same command resumes.

    Like KeyboardInterrupt no Exception, so that a user's `except Exception` does not swallow it.
    """

    def __init__(self, signal_number: int) -> None:
        self.message = f"stopped by signal {signal_number}"
        self.hint = "run the same command again: it resumes where it stopped"
        self.exit_code = 128 + signal_number
        super().__init__(self.message)


class RowFault(Exception):
    """One row that cannot be used: a reason word for the ledger, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
