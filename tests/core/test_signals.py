"""A signal is a wish, a second one leaves at once, and both with the exit code that a queue expects."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from framework.core import signals
from framework.core.errors import FrameworkError, Interrupted, LeftAtOnce
from framework.core.signals import StopRequest, current, stop_request

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_is_a_wish_granted_at_a_safe_point(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with stop_request() as stop:
        stop.leave("before anything")
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="stopped after step 3; the same command continues") as caught:
            stop.leave("after step 3")
    assert caught.value.exit_code == stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_signal_leaves_where_it_stands_and_nobody_s_handler_holds_it_up() -> None:
    with stop_request():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(LeftAtOnce, match="without saving") as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130
    assert not isinstance(caught.value, Exception | FrameworkError)


def test_an_inner_block_shares_the_request_of_the_outer_one() -> None:
    with stop_request() as outer:
        with stop_request() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner is outer is current()
        assert outer.exit_code == 143
    assert current().exit_code == 0


def test_a_thread_cannot_listen_and_is_never_asked() -> None:
    found: list[StopRequest] = []

    def work() -> None:
        with stop_request() as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].exit_code == 0


def test_a_launcher_s_echo_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ECHO_S", 60.0)
    stop = StopRequest()
    stop.ask(signal.SIGTERM)
    stop.ask(signal.SIGTERM)
    monkeypatch.setattr(signals, "_ECHO_S", 0.0)
    with pytest.raises(LeftAtOnce):
        stop.ask(signal.SIGTERM)


# The main thread waits in native code for a lock that it holds itself, as in a collective whose peer hangs: no handler
# of Python's runs there.
STUCK = """
import ctypes
from framework.core import signals
signals.LAST_S = 0.2
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with signals.stop_request():
    libc.pthread_mutex_lock(lock)
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)
"""


def test_a_second_signal_ends_a_process_that_runs_no_handler() -> None:
    root = Path(signals.__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
