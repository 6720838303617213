"""The errors a user meets, each with its exit code, and the nearest-name hint.

A `FrameworkError` is printed as one line without a traceback. Anything else is our own fault and keeps its traceback.
"""

import contextlib
import difflib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path


class FrameworkError(Exception):
    """A failure that the message explains. Exit code 1: something went wrong after work had started."""

    exit_code = 1


class UsageError(FrameworkError):
    """A wrong command, recipe or combination; found before any worker starts. Exit code 2."""

    exit_code = 2


class DataError(UsageError):
    """Data that cannot be used; the message names the file and, where there is one, the line."""

    def __init__(self, message: str, path: str | None = None, line: int | None = None):
        place = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(place + message)


class CheckpointError(FrameworkError):
    """A checkpoint or weights folder that is incomplete, altered, or belongs to another model."""


class NonFiniteError(FrameworkError):
    """The loss or the gradient is NaN or infinite and the recipe says to stop."""


class Interrupted(FrameworkError):
    """The run was asked to stop, saved, and stopped. `exit_code` says by what: 130 interrupted, 143 terminated."""

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.exit_code)  # it keeps its code on the way home from a Ray worker


class LeftAtOnce(KeyboardInterrupt):
    """A second signal came. No FrameworkError, so that nobody who handles failures, or saves, holds it up."""

    def __init__(self, exit_code: int):
        super().__init__("stopped at once, without saving")
        self.exit_code = exit_code


class WorkerError(FrameworkError):
    """A worker died or raised; the message names role, rank and phase, and shows its last log lines."""


class DeadlineError(WorkerError):
    """A remote call or collective did not answer within its deadline."""


@contextlib.contextmanager
def foreign(what: str, kind: type[FrameworkError] = FrameworkError) -> Iterator[None]:
    """Code from outside the project runs in here: what it raises becomes a `kind` that names `what` and the line."""
    try:
        yield
    except FrameworkError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{what}: {blamed(error)}") from error


def blamed(error: BaseException) -> str:
    """Where and what: "my_ppo.py:3: KeyError: 'answer'"."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())
    return f"{Path(frame.filename).name}:{frame.lineno}: {type(error).__name__}: {said}"


def nearest(name: str, choices: Iterable[str]) -> str:
    """The sentence that ends an unknown-name error: the closest choice where one is close, and all of them where few.

    >>> nearest("cosin", ["cosine", "linear"])
    "did you mean 'cosine'? Choose one of: cosine, linear"
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'?" if close else ""
    listing = f"Choose one of: {', '.join(known)}" if 0 < len(known) <= 24 else ""
    return " ".join(part for part in (hint, listing) if part) or f"there are {len(known)} to choose from"
