"""The process of one rank: `python -m framework.cluster.rank ROLE REPORT`, its work on standard input (see `ranks`).

It ends with whoever started it, and what went wrong is left in the file REPORT.
"""

import os
import pickle
import sys
import threading
import traceback
from pathlib import Path

from framework.cluster.failure import Failure
from framework.core.deadline import ending
from framework.core.errors import FrameworkError, Interrupted


def main(role: str, report: Path) -> int:
    """The exit code that the command would have had."""
    rank = int(os.environ["RANK"])
    try:
        work, argument = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        with ending(lambda error: _tell(report, error, role, rank)):
            work(argument)
    except KeyboardInterrupt as error:
        left = Interrupted(str(error) or "interrupted", getattr(error, "exit_code", 130))
        return _tell(report, left, role, rank)
    except Exception as error:
        if not isinstance(error, FrameworkError):
            traceback.print_exc()
        return _tell(report, error, role, rank)
    return 0


def _tell(report: Path, error: Exception, role: str, rank: int) -> int:
    explained = error if isinstance(error, FrameworkError) else None
    beside = report.with_suffix(".new")
    beside.write_bytes(pickle.dumps((Failure.of(error, role, rank, "run"), explained)))
    beside.replace(report)
    return 1 if explained is None else explained.exit_code


def _leave_with_parent() -> None:
    """Nothing more comes in: the end of the input is the end of the process that started this one."""
    os.read(0, 1)  # not through sys.stdin, whose lock would be missed at this process's own end
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
