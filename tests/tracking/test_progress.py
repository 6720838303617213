"""Plain lines at the right moments with the right arithmetic; a bar only on a terminal."""

import io

import pytest

from framework.tracking.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_seldom_and_the_last_one_always() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("sft", total=1000, stream=stream, clock=clock) as progress:
        for step in range(1, 1001):
            clock.now = step * 0.5
            progress(step, loss=4.0 - step / 500)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft: 2/1,000 steps (0%), 8:19 to go, loss 3.996"
    assert lines[1] == "sft: 6/1,000 steps (1%), 8:17 to go, loss 3.988"
    assert lines[-1] == "sft: 1,000/1,000 steps (100%), took 8:20, loss 2"
    assert len(lines) == 14  # after 1, 3, 7, 15, 31, 63, 123, ... 483 s, and the end


def test_the_eta_counts_what_this_attempt_did() -> None:
    clock = Clock()
    with Progress("sft", total=100, start=50, stream=io.StringIO(), clock=clock) as progress:
        clock.now = 10.0
        progress(60)
        assert "(60%), 40 s to go" in progress.line()
        progress(50)
        assert "to go" not in progress.line()


def test_without_a_total_it_says_what_is_done() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("preparing", unit="bytes", stream=stream, clock=clock) as progress:
        clock.now = 75.0
        progress(1234567)
    assert stream.getvalue() == "preparing: 1,234,567 bytes, took 1:15\n"


def test_an_error_prints_no_last_line_and_silence_is_possible() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("a", total=2, stream=stream) as progress:
        progress(1 // 0)
    with Progress("a", total=2, stream=stream, enabled=False) as progress:
        progress(2)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("sft", total=10, stream=stream) as progress:
        progress(10, loss=1.25)
    shown = stream.getvalue()
    assert "sft" in shown
    assert "10/10" in shown
    assert "loss 1.25" in shown
