"""Ctrl-C, SIGTERM and SIGUSR1 (what a queue sends before it kills) become a wish, granted at the next safe point.

Left out: that ranks grant it together (`runtime.heed`). No torch here, so that a command listens before it imports any.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from framework.core.errors import Interrupted, LeftAtOnce

_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}
EXIT_CODES: dict[int, int] = {getattr(signal, name): code for name, code in _CODES.items() if hasattr(signal, name)}
LAST_S = 5.0  # from the second signal until the process ends, whatever its main thread is doing
# torchrun sends its workers what it gets, and a queue that signals a whole job has sent it to them already.
_ECHO_S = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class StopRequest:
    """Whether this process was asked to stop. Safe points look at it:

        with stop_request() as stop:
            for batch in ...:
                stop.leave("during evaluation")  # this process by itself; where ranks share the loop: runtime.heed

    A second signal does not wait: it raises LeftAtOnce where the program stands.
    """

    def __init__(self) -> None:
        self.exit_code = 0  # 130 or 143 once asked
        self._count = _Count()

    def leave(self, where: str) -> None:
        """A safe point of this process alone: raise Interrupted if it was asked to stop."""
        if self.exit_code:
            raise self.error(where, self.exit_code)

    def error(self, where: str, exit_code: int) -> Interrupted:
        """What to raise once all is saved."""
        return Interrupted(f"stopped {where}; the same command continues from here", exit_code)

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        self.exit_code = EXIT_CODES[number]
        if self._count.add() > 1:
            raise LeftAtOnce(self.exit_code)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for the signals in this block. An inner block (a stage's in a pipeline's) shares the outer one's request.

    Only a process's main thread can listen; in another one the request is there but never asked.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield current()
        return
    _current = StopRequest()
    before = {number: signal.signal(number, _current.ask) for number in EXIT_CODES}
    try:
        with _last_resort():
            yield _current
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)


def current() -> StopRequest:
    """The request that this process listens with; one that nobody asks where it does not listen."""
    return _current or StopRequest()


_current: StopRequest | None = None


class _Count:
    """How many signals came, echoes not counted."""

    def __init__(self) -> None:
        self._number, self._at = 0, -_ECHO_S

    def add(self) -> int:
        now = time.monotonic()
        if now - self._at >= _ECHO_S:
            self._number, self._at = self._number + 1, now
        return self._number


@contextmanager
def _last_resort() -> Iterator[None]:
    """Python runs no handler while the main thread sits in native code, a collective that hangs for one. A thread hears
    the signals too, and ends the process if the second has not."""
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_after_the_second, args=(ears,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        mouth.close()


def _end_after_the_second(ears: socket.socket) -> None:
    """Wait for two signals, then for the block's end, a third signal, or time; only the first lets the process live."""
    count, exit_code, number = _Count(), 0, 0
    with ears:
        while number < 2:
            heard = ears.recv(1)
            if not heard:
                return
            if heard[0] in EXIT_CODES:
                exit_code, number = EXIT_CODES[heard[0]], count.add()
        ears.settimeout(LAST_S)
        try:
            if not ears.recv(1):
                return
        except TimeoutError:
            pass
        os._exit(exit_code)
