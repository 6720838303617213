"""One node of a job: `python -m framework.cluster.node HOST PORT`, which srun starts once a node (see `slurm`).

It answers the roll call, starts what it is told in a private folder of its own, passes on what the scheduler signals,
and leaves no process behind. It imports neither torch nor Ray, so that every node is there at once.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from framework.cluster import reaper
from framework.cluster.failure import log_tail
from framework.cluster.local_ray import private_folder, signals_blocked, token_settings
from framework.cluster.roll_call import ASKED, ENDED, LEAVE, RUN, SIGNAL, call_in, heard
from framework.core.signals import EXIT_CODES

TOKEN = "FRAMEWORK_JOB_TOKEN"
Process = subprocess.Popen[bytes]


class Node:
    """Heeds what the first node says, until it says that all may leave, or hangs up."""

    def __init__(self, call: Connection, folder: str, token: str) -> None:
        self._call, self._folder, self._token = call, Path(folder), token
        self._events: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
        self._work: Process | None = None

    def serve(self) -> int:
        """The exit code that the job leaves with."""
        for number in EXIT_CODES:
            signal.signal(number, lambda number, _: self._events.put((ASKED, {"number": number})))
        self._say(os.environ["SLURMD_NODENAME"], **_place(self._call), folder=str(self._folder))
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            what, about = self._events.get()
            if what == LEAVE:
                return int(about["code"])
            if what == RUN:
                self._run(**about)
            elif what == SIGNAL and self._work is not None:
                self._work.send_signal(about["number"])
            elif what in (ASKED, ENDED):
                self._say(what, **about)

    def _run(self, order: list[str], ray: bool, service: bool) -> None:
        """Start `order`; `ray` gives it the token of the job's Ray. What a service starts hears no signals, and what it
        prints is shown only where it fails."""
        settings = token_settings(self._token) if ray else {}
        whole = {**os.environ, reaper.MARK: str(self._folder), "TMPDIR": str(self._folder), **settings}
        environment = {name: value for name, value in whole.items() if value is not None}
        log = self._folder / "service.log"
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("wb")) if service else None
            if service:
                stack.enter_context(signals_blocked())
            process = subprocess.Popen(
                order, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._work = None if service else process
        threading.Thread(target=self._wait, args=(process, log), daemon=True).start()

    def _wait(self, process: Process, log: Path) -> None:
        code = process.wait()
        self._events.put((ENDED, {"code": code if code >= 0 else 128 - code, "printed": log_tail(log)}))

    def _listen(self) -> None:
        for said in heard(self._call):
            self._events.put(said)
        self._events.put((LEAVE, {"code": 1}))

    def _say(self, what: str, **about: Any) -> None:
        with contextlib.suppress(OSError):
            self._call.send_bytes(json.dumps([what, about]).encode())


def _place(call: Connection) -> dict[str, str]:
    """This node's address on the way to the first one, the first one's as seen from here, and the CPUs given here."""
    with socket.socket(fileno=os.dup(call.fileno())) as line:
        own, first = line.getsockname()[0], line.getpeername()[0]
    return {"own": own, "first": first, "cpus": os.environ.get("SLURM_CPUS_ON_NODE", "")}


def main(host: str, port: int) -> int:
    """The life of a node; the folder, and every process that was started in it, end with this one."""
    token = os.environ.pop(TOKEN)
    with private_folder() as folder, call_in(host, port, token.encode()) as call:
        return Node(call, folder, token).serve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
