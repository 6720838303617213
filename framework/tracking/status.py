"""Where a run stands, as `status.json` says it: written by the run, printed for anyone by `framework status RUN`."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from framework.core.errors import UsageError
from framework.tracking.atomic import replace_json

STATUS = "status.json"
# What is no number.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("state", "stage", "host"), str),
    **{"parents": dict, "last_error": str | None, "eta_seconds": int | float | None},
}


@dataclass(frozen=True)
class Status:
    """Example: {"state": "running", "stage": "sft", "step": 120, "total": 400, "eta_seconds": 35.0, "attempt": 2}."""

    state: str = "running"  # running | finished | interrupted | failed
    stage: str = ""
    step: int = 0
    total: int = 0  # 0 = not known yet
    eta_seconds: float | None = None
    attempt: int = 0  # how often this run was started
    seconds: float = 0.0  # spent at work, over all attempts
    last_error: str | None = None
    parents: dict[str, str] = field(default_factory=dict)  # role -> digest of the folder that the result depends on
    updated: float = 0.0  # seconds since 1970
    host: str = ""
    pid: int = 0


def read_status(folder: Path) -> Status | None:
    """The status of a run folder, None where it has none."""
    try:
        content = json.loads((Path(folder) / STATUS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{Path(folder) / STATUS} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{Path(folder) / STATUS} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{Path(folder) / STATUS} is not the status of a run: {str(content)[:40]}")
    known = {entry.name for entry in fields(Status)} & content.keys()
    for name in sorted(known):
        if not isinstance(content[name], _KINDS.get(name, int | float)):
            raise UsageError(f"{Path(folder) / STATUS} is not the status of a run: {name} is {content[name]!r}")
    return Status(**{name: content[name] for name in known})


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json, stamped with time, host and process."""
    stamp = {"updated": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    replace_json(folder / STATUS, asdict(status) | stamp)


def describe(folder: Path, now: float | None = None) -> str:
    """One to three lines for a person. Raises UsageError where `folder` is no run."""
    status = read_status(folder)
    if status is None:
        raise UsageError(f"{folder} is not a run folder: it has no {STATUS}")
    parts = [f"{folder}: {_state(status)}"]
    if status.total:
        parts.append(f"step {status.step:,} of {status.total:,} ({status.step / status.total:.0%})")
    if status.state == "running" and status.eta_seconds is not None:
        parts.append(f"{duration(status.eta_seconds)} to go")
    parts += [f"attempt {status.attempt}", f"{duration(status.seconds)} of work"]
    age = (time.time() if now is None else now) - status.updated
    lines = [", ".join(parts), f"  last written {duration(max(0.0, age))} ago"]
    return "\n".join(lines + ([f"  last error: {status.last_error}"] if status.last_error else []))


def duration(seconds: float) -> str:
    """7.0 -> "7 s", 75 -> "1:15", 3675 -> "1:01:15"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else str(timedelta(seconds=whole)).removeprefix("0:").lstrip("0")


def _state(status: Status) -> str:
    """A process that was killed leaves "running" behind; on its own machine that can be told."""
    here = status.host == socket.gethostname()
    gone = status.state == "running" and here and Path("/proc").exists() and not Path(f"/proc/{status.pid}").exists()
    return "stopped without a word (killed?); the same command continues it" if gone else status.state
