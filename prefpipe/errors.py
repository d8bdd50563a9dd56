"""The error tree: every failure that a user can cause or meet, with the exit code of the command.

PrefpipeError                 1   anything else
  UsageError                  2   bad flag, recipe, name or value; OUT belongs to another config
  StrictError                 3   with --strict, a rule said STOP or a check of the data warned
  DataError                  65   bad or damaged data, or no row is left
  MissingInputError          66   an input is not there
  StorageError               74   I/O error, disk full
  LockedError                75   another process holds OUT
  IdentityError              76   cached values belong to another model than the one in use
  Interrupted       130/143/129   Ctrl-C / SIGTERM / SIGHUP (the terminal is gone); the same command resumes

RowFault is not in the tree: it concerns one row, which goes to the ledger, and the command goes on.
"""


class PrefpipeError(Exception):
    """`message` says what happened, with the value and the place; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, str], dict[str, object]]:
        """An error of a worker process comes back whole."""
        return type(self), (self.message, self.hint), {**self.__dict__, "args": self.args}


class UsageError(PrefpipeError):
    """A bad flag, recipe, name or value, or an output directory that belongs to another config."""

    exit_code = 2


class StrictError(PrefpipeError):
    """A check that `--strict` turns into an error failed. Everything up to it is written."""

    exit_code = 3


class DataError(PrefpipeError):
    """Bad or damaged data, or no row is left."""

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
    """A cached value, a run or an adapter belongs to another model than the one in use."""

    exit_code = 76


def of_process(message: str, hint: str, code: int) -> PrefpipeError:
    """The error for a process that failed: of the kind that has its exit code, -N for a death by signal N. This process
    then fails with the same code."""
    code = 128 - code if code < 0 else code or 1
    kinds = {kind.exit_code: kind for kind in PrefpipeError.__subclasses__()}
    error = kinds.get(code, PrefpipeError)(message, hint)
    error.exit_code = code
    return error


class Interrupted(BaseException):
    """A signal asked the command to stop. What was committed is kept, and the same command resumes.

    It derives from BaseException, as KeyboardInterrupt does: `except Exception` in a user's reward lets it pass.
    """

    def __init__(self, signal_number: int) -> None:
        self.message = f"stopped by signal {signal_number}"
        self.hint = "run the same command again: it resumes where it stopped"
        self.exit_code = 128 + signal_number
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.exit_code - 128,)


class RowFault(Exception):
    """One row that cannot be used. `reason` is the word of the ledger (docs/datasets.md), `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)
