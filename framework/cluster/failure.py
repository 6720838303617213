"""What went wrong in which worker: the first failure of a group, told in one message. No Ray here.

When one rank of a group dies, its peers fail too, an instant later, in the collective they share with it. The report
must name the one that started it: a dead process before an exception, then the earliest by its own clock. Where a dead
one stood only its peers can tell.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from framework.core.errors import DeadlineError, FrameworkError, WorkerError

LOG_LINES = 12


@dataclass(frozen=True)
class Failure:
    """One rank's failure in one call. Example: Failure("actor", 1, "update", "its process (pid 71) died", None)."""

    role: str
    rank: int
    phase: str  # the method called, or "start"
    cause: str
    error_class: type[FrameworkError] | None = None  # of an error that explains itself
    time: float = 0.0  # 0 = a process that died
    exit_code: int = 1

    @classmethod
    def of(cls, error: BaseException, role: str, rank: int, phase: str) -> "Failure":
        """What is left of an exception on its way to the controller: text and, for our own errors, the class."""
        explained = type(error) if isinstance(error, FrameworkError) else None
        cause = str(error) if explained else "".join(traceback.format_exception_only(error)).strip()
        return cls(role, rank, phase, cause, explained, time.time(), getattr(error, "exit_code", 1))

    def exception(self, log: Path) -> FrameworkError:
        """The error to raise in the controller: our own classes as they are, everything else a WorkerError with the
        last lines of the worker's log."""
        if self.error_class is not None:
            return revive(self.error_class, f"{place(self.role, self.rank, self.phase)}: {self.cause}", self.exit_code)
        return WorkerError(f"{place(self.role, self.rank, self.phase)} failed: {self.cause}{log_tail(log)}")


def first(failures: Sequence[Failure], ask: Callable[[], str] = str) -> Failure:
    """The failure that the others follow from; a dead process with where all stood, as its peers say, or `ask`."""
    found = min(failures, key=lambda failure: failure.time)
    if found.time:
        return found
    said = next((each.cause for each in failures if each.error_class is DeadlineError), "") or ask()
    return replace(found, cause=f"{found.cause}; {said}") if said else found


def late(role: str, ranks: Sequence[int], phase: str, seconds: float, log: Path, where: str = "") -> DeadlineError:
    """The error for ranks that did not answer in time, and `where` all of the role stand; `log` is the first one's."""
    listing = ", ".join(str(rank) for rank in ranks)
    return DeadlineError(
        f"{role} rank {listing} did not answer '{phase}' within {seconds:g} s{where and f': {where}'}; if the work is "
        f"this long, raise {'cluster.start_deadline_s' if phase == 'start' else 'cluster.deadline_s'}{log_tail(log)}"
    )


def named(error: FrameworkError, role: str, rank: int, phase: str) -> FrameworkError:
    """An error of the same class whose message says where it happened."""
    return revive(type(error), f"{place(role, rank, phase)}: {error}", error.exit_code)


def place(role: str, rank: int, phase: str) -> str:
    """Example: "actor rank 1, update"."""
    return f"{role} rank {rank}, {phase}"


def revive(error_class: type[FrameworkError], message: str, exit_code: int) -> FrameworkError:
    """An error of a class whose constructor may want more than the message."""
    error = error_class.__new__(error_class)
    Exception.__init__(error, message)
    error.exit_code = exit_code
    return error


def log_tail(log: Path, lines: int = LOG_LINES) -> str:
    """The end of a worker's log, indented under its name; "" where there is nothing to show."""
    if not log.is_file():
        return ""
    tail = log.read_text(errors="replace").splitlines()[-lines:]
    return f"\nlast lines of {log}:" + "".join(f"\n  {line}" for line in tail) if tail else ""
