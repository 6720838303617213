"""How far a long step is, for a person: a bar with ETA on a terminal, a plain line now and then elsewhere.

    with Progress("sft", total=400, unit="steps") as progress:
        progress(120, loss=3.21)            # done so far, not the increment

Plain lines look like this, the first after a second, then twice as seldom each time up to one a minute:
    sft: 120/400 steps (30%), 35 s to go, loss 3.21
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self, TextIO

from framework.tracking.status import duration

_FIRST, _SELDOM = 1.0, 60.0  # seconds between plain lines


class Progress:
    """`total` None: the end is not known, and only what is done is shown. `start`: what an earlier attempt had done."""

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "steps",
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit, self.start = what, total, unit, start
        self._stream = stream or sys.stderr
        self._clock, self._began, self._last, self._wait = clock, clock(), clock(), _FIRST
        self._enabled, self._done, self._printed = enabled, start, -1
        self._figures: dict[str, float] = {}
        self._bar: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._enabled and self._stream.isatty():
            self._bar = _bar(self._stream)
            self._stack.enter_context(self._bar)
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.start, unit=self.unit, note="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._enabled and self._bar is None and self._done != self._printed and error[0] is None:
            self._print()
        self._stack.close()

    def __call__(self, done: int, **figures: float) -> None:
        """`done` so far of the whole; `figures` are shown beside it and stay until they change."""
        self._done = done
        self._figures |= figures
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._note())
        elif self._enabled and self._clock() - self._last >= self._wait:
            self._print()
            self._wait = min(2 * self._wait, _SELDOM)

    def _print(self) -> None:
        self._last, self._printed = self._clock(), self._done
        print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """The plain line for this moment."""
        parts = [f"{self._done:,} {self.unit}"]
        if self.total:
            parts = [f"{self._done:,}/{self.total:,} {self.unit} ({self._done / self.total:.0%})"]
            new, left = self._done - self.start, self.total - self._done
            if new > 0 and left > 0:
                parts.append(f"{duration((self._clock() - self._began) / new * left)} to go")
        if self._done >= (self.total or self._done):
            parts.append(f"took {duration(self._clock() - self._began)}")
        note = self._note()
        return f"{self.what}: {', '.join([*parts, note] if note else parts)}"

    def _note(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self._figures.items())


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(file=stream),
    )
