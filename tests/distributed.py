"""Ranks for tests: forked processes of one thread each, joined by gloo, with a deadline on every join.

Forking a process that has already imported torch takes 0.2 s where torchrun takes 10 s. Import what the ranks need
(fully_shard, say) at the top of the test, so that they inherit it instead of importing it each.
"""

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from framework.core import runtime

_GRACE_S = 15.0  # what the others get to end by themselves once one has failed: they first ask where all stand


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 60.0, deadline_s: float = 30.0
) -> list[Any]:
    """What `function(runtime, *arguments)` returned on each rank; a rank that fails or hangs fails the test with its
    traceback. `deadline_s` is the process group's own."""
    fork = multiprocessing.get_context("fork")
    address = f"127.0.0.1:{runtime.free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        common = (function, arguments, world_size, address, place, timeout_s, deadline_s)
        ranks = [fork.Process(target=_rank, args=(rank, *common), daemon=True) for rank in range(world_size)]
        for process in ranks:
            process.start()
        _join(ranks, timeout_s)
        failures = [_report(rank, process, place) for rank, process in enumerate(ranks) if process.exitcode != 0]
        assert not failures, "\n".join(failures)
        return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    world_size: int,
    address: str,
    place: Path,
    timeout_s: float,
    deadline_s: float,
) -> None:
    torch.set_num_threads(1)
    with (place / f"{rank}.log").open("w") as log:
        faulthandler.dump_traceback_later(0.9 * timeout_s, file=log)
        try:
            here = runtime.start("cpu", 1, rank=rank, world_size=world_size, address=address, deadline_s=deadline_s)
            torch.save(function(here, *arguments), place / f"{rank}.pt")
            runtime.stop()
        except BaseException:
            log.write(traceback.format_exc())
            raise SystemExit(1) from None


def _join(ranks: Sequence[BaseProcess], timeout_s: float) -> None:
    """Wait for all; once one has failed, or time is up, the rest is not waited for."""
    end = time.monotonic() + timeout_s
    failed = False
    while time.monotonic() < end and any(process.is_alive() for process in ranks):
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            failed, end = True, min(end, time.monotonic() + _GRACE_S)
        time.sleep(0.005)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join(_GRACE_S)


def _report(rank: int, process: BaseProcess, place: Path) -> str:
    log = place / f"{rank}.log"
    return f"rank {rank} left with {process.exitcode}:\n{log.read_text() if log.exists() else 'it never began'}"
