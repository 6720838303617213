"""A process beside the controller that ends what a private Ray leaves behind, even when the controller was SIGKILLed:
Ray's own agents and half-started workers then stay for minutes. Run as a script; imports nothing of ours.

It waits until its standard input closes, which the controller's end does whichever way it comes, then kills every
process whose environment carries the mark, and removes the folder.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "FRAMEWORK_RAY"  # = the folder; set when Ray starts, inherited by every process under it
_PATIENCE_S = 10.0


def main(folder: str) -> None:
    """Wait, kill, remove."""
    sys.stdin.buffer.read()
    until = time.monotonic() + _PATIENCE_S
    while (left := marked(folder)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def marked(folder: str) -> list[int]:
    """Running processes that were started under the mark. Empty where there is no /proc."""
    mark = f"\0{MARK}={folder}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + (entry / "environ").read_bytes() + b"\0":
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
