"""One piece of work on several ranks of this machine, a process each: started, watched, stopped, one error told.

Ranks meet by torchrun's variables, so the work cannot tell who started it. Rank 0 speaks to the terminal, the others
into logs/ROLE-RANK.log. Left out: more than one machine, and ranks that come back (a run continues by its command).
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from framework.cluster import failure
from framework.cluster.failure import Failure
from framework.core.deadline import ask
from framework.core.errors import FrameworkError, Interrupted
from framework.core.runtime import free_port
from framework.core.signals import StopRequest, stop_request

GRACE_S = 10.0  # for the other ranks to end by themselves, once one has failed
_LOOK_S = 0.05

Process = subprocess.Popen[bytes]


def run_ranks(role: str, work: Callable[[Any], Any], argument: Any, world: int, logs: Path) -> None:
    """`work(argument)`, both picklable, on `world` ranks; returns when all are done.

    A stop signal to this process goes to every rank once; a second one ends them at once. Raises what the first failing
    rank raised: our own errors as they are, everything else as a WorkerError with the end of its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port, payload = free_port(), pickle.dumps((work, argument))
    files = [logs / f"{role}-{rank}.log" for rank in range(world)]
    with tempfile.TemporaryDirectory() as folder, stop_request() as stop:
        reports = [Path(folder) / str(rank) for rank in range(world)]
        ranks: list[Process] = []
        try:
            for rank in range(world):
                variables = _variables(rank, world, port)
                ranks.append(_start(role, payload, variables, reports[rank], files[rank] if rank else None))
            codes = _watch(ranks, stop)
            is_stuck = any(code < 0 for code in codes.values()) and any(process.poll() is None for process in ranks)
            where = ask("127.0.0.1", port, world) if is_stuck else ""
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        failures = [_failure(role, rank, code, reports[rank]) for rank, code in codes.items()]
        if failures:
            raise _error(failures, files, stop, where)


def _variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set; and a share of the cores each, where nothing else is said."""
    threads = str(max(1, (os.cpu_count() or 1) // world))
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    shared = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    return {"OMP_NUM_THREADS": threads, **os.environ, **shared, **{name: str(value) for name, value in own.items()}}


def _start(role: str, payload: bytes, variables: dict[str, str], report: Path, log: Path | None) -> Process:
    """A session of its own: Ctrl-C at the terminal reaches this process alone, which passes it on."""
    command = [sys.executable, "-m", "framework.cluster.rank", role, str(report)]
    output = None if log is None else log.open("ab")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=variables, start_new_session=True
        )
    finally:
        if output is not None:
            output.close()
    assert process.stdin is not None
    process.stdin.write(payload)  # and stays open: its end tells the rank that we are gone
    process.stdin.flush()
    return process


def _watch(ranks: Sequence[Process], stop: StopRequest) -> dict[int, int]:
    """Until all have ended, or one has failed and the others have had time to. The codes of those that failed."""
    told, end = False, float("inf")
    while None in (codes := [process.poll() for process in ranks]) and time.monotonic() < end:
        if any(codes):
            end = min(end, time.monotonic() + GRACE_S)
        if stop.exit_code and not told:
            told = True
            for process in ranks:
                process.send_signal(signal.SIGINT if stop.exit_code == 130 else signal.SIGTERM)
        time.sleep(_LOOK_S)
    return {rank: code for rank, code in enumerate(codes) if code}


def _failure(role: str, rank: int, code: int, report: Path) -> tuple[Failure, FrameworkError | None]:
    """What a rank left behind, and its own error where it explains itself."""
    if report.exists():
        told: tuple[Failure, FrameworkError | None] = pickle.loads(report.read_bytes())
        return told
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Failure(role, rank, "run", f"its process ended by {name}"), None


def _error(
    failures: Sequence[tuple[Failure, FrameworkError | None]], logs: Sequence[Path], stop: StopRequest, where: str
) -> FrameworkError:
    """The one error that the others follow from. Ranks that say the same are one voice. `where`: where all stood."""
    first = failure.first([each for each, _ in failures], lambda: where)
    own = next(error for each, error in failures if each.rank == first.rank)
    if stop.exit_code and not isinstance(own, Interrupted) and first.time == 0:
        return Interrupted("stopped before there was anything to save", stop.exit_code)
    if own is not None and (isinstance(own, Interrupted) or {each.cause for each, _ in failures} == {first.cause}):
        return own
    return first.exception(logs[first.rank])
