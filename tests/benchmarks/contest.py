"""Rivals in turns: each works in a process of its own and halts after every lap, so that only one runs at a time.

A contestant is a function `run(place, laps)`: it calls `laps.ready(...)` once it is set up and `laps.done(...)` behind
each lap, which halts it until its next turn comes. Every round all run one lap, in a new order; the first round warms
up and does not count. Ratios are taken within a round, where the machine was as busy for all of them; the median over
the rounds is what is claimed. Beside it stands the ratio of processor time, which does not count the waiting for a core
that other programs hold. Left out: pinning cores and clocks, which a shared machine does not grant.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

CLOSE = 1e-4


@dataclass(frozen=True)
class Lap:
    """Example: Lap(seconds=2.1, busy=2.0, trained=3500, read=9800). `busy`: processor seconds, children's with them."""

    seconds: float
    busy: float
    trained: int
    read: int


@dataclass(frozen=True)
class Pledge:
    """What a contestant says before it starts: `equal` must be the same number for all, `close` within 1e-4."""

    equal: Mapping[str, int] = field(default_factory=dict)
    close: Mapping[str, float] = field(default_factory=dict)


class Laps:
    """A contestant's end of the line."""

    def __init__(self, line: Connection):
        self._line, self._began, self._used = line, 0.0, 0.0

    def ready(self, equal: Mapping[str, int] | None = None, close: Mapping[str, float] | None = None) -> None:
        """All is set up; returns when the first lap may begin."""
        self._line.send(Pledge(equal or {}, close or {}))
        self._wait()

    def done(self, trained: int, read: int) -> None:
        """A lap is over, so many tokens long; returns when the next one may begin."""
        self._line.send(Lap(time.perf_counter() - self._began, _busy() - self._used, trained, read))
        self._wait()

    def _wait(self) -> None:
        self._line.recv()
        self._began, self._used = time.perf_counter(), _busy()


def _busy() -> float:
    """Processor seconds of this process and of children that have ended."""
    return sum(os.times()[:4])


Run = Callable[[Path, Laps], None]


@dataclass(frozen=True)
class Contest:
    """What came out: by contestant its laps, round by round, and the pledge that all agreed on."""

    laps: Mapping[str, list[Lap]]
    pledge: Pledge

    @property
    def ours(self) -> str:
        return next(iter(self.laps))

    def speeds(self, name: str, what: str = "seconds") -> list[float]:
        """Trained tokens a second, by round; what="busy": a second of processor time."""
        return [lap.trained / getattr(lap, what) for lap in self.laps[name]]

    def ratios(self, rival: str, what: str = "seconds") -> list[float]:
        """How many times as fast ours was, by round."""
        return [a / b for a, b in zip(self.speeds(self.ours, what), self.speeds(rival, what), strict=True)]


def compete(contestants: Mapping[str, Run], place: Path, rounds: int) -> Contest:
    """The first contestant is ours. They are ended where they halt behind their last lap."""
    spawn = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    pledges: list[Pledge] = []
    processes: list[Any] = []
    try:
        for number, (name, run) in enumerate(contestants.items()):
            lines[name], far = spawn.Pipe()
            own = place / f"contestant-{number}"
            own.mkdir()
            processes.append(spawn.Process(target=_serve, args=(run, own, far)))
            processes[-1].start()
            far.close()
            pledges.append(_hear(name, lines[name]))
            _agree(name, pledges[-1], pledges[0])
        return Contest(_race(lines, rounds), pledges[0])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _race(lines: Mapping[str, Connection], rounds: int) -> dict[str, list[Lap]]:
    order, shuffle = list(lines), random.Random(0)
    laps: dict[str, list[Lap]] = {name: [] for name in lines}
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            lines[name].send(None)
            lap = _hear(name, lines[name])
            if number:
                laps[name].append(lap)
    return laps


def _serve(run: Run, place: Path, line: Connection) -> None:
    run(place, Laps(line))


def _hear(name: str, line: Connection) -> Any:
    try:
        return line.recv()
    except EOFError:
        raise RuntimeError(f"{name} ended early; what it said stands above") from None


def _agree(name: str, pledge: Pledge, first: Pledge) -> None:
    """All do the same work, or there is nothing to compare."""
    assert pledge.equal == first.equal, f"{name}: {pledge.equal}, ours {first.equal}"
    for what, value in first.close.items():
        assert abs(pledge.close[what] - value) <= CLOSE * abs(value), f"{name}: {pledge.close}, ours {first.close}"


# --- what is shown -------------------------------------------------------------------------------------------------


def report(
    title: str, contest: Contest, facts: Mapping[str, Any], out: Path | None, unit: str = "trained tokens"
) -> None:
    """Print a table, and add every lap to the JSON file `out`. `unit` is what a lap's `trained` counts."""
    facts = {**facts, **machine()}
    shown = [f"{name} {value:,}" for name, value in contest.pledge.equal.items()]
    shown += [f"{name} {value:.5f}" for name, value in contest.pledge.close.items()]
    print(f"\n### {title}\n\n{', '.join(f'{name} {value}' for name, value in facts.items())}.")
    print(f"The same for all: {', '.join(shown)}.")
    print(f"Median over {len(contest.laps[contest.ours])} rounds, least and most in brackets.\n")
    columns = ["", f"{unit}/s", "read tokens/s", "ours is faster by the factor", "in processor time"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in contest.laps:
        print(f"| {' | '.join(_row(contest, name))} |")
    if out is not None:
        content = json.loads(out.read_text()) if out.exists() else {}
        laps = {name: [asdict(lap) for lap in laps] for name, laps in contest.laps.items()}
        content[title] = {"facts": facts, "pledge": asdict(contest.pledge), "laps": laps}
        out.write_text(json.dumps(content, indent=1) + "\n")


def _row(contest: Contest, name: str) -> list[str]:
    laps = contest.laps[name]
    read = f"{median(lap.read / lap.seconds for lap in laps):,.0f}" if laps[0].read else ""
    cells = [name, _spread(contest.speeds(name)), read]
    if name == contest.ours:
        return [*cells, "", ""]
    return [*cells, *(_spread(contest.ratios(name, what)) for what in ("seconds", "busy"))]


def machine() -> dict[str, str]:
    """What was measured on, in words that mean something elsewhere."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    card = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {"on": card, "python": platform.python_version(), "torch": torch.__version__}


def options(text: str, argv: list[str] | None, **defaults: int) -> argparse.Namespace:
    """The command line of a benchmark: sizes, `--rounds` and `--out`."""
    words = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        words.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    words.add_argument("--out", type=Path, help="a JSON file to add every lap to")
    return words.parse_args(argv)


def _spread(values: list[float]) -> str:
    form = "{:,.0f}" if median(values) >= 100 else "{:.2f}"
    middle, least, most = (form.format(v) for v in (median(values), min(values), max(values)))
    return f"{middle} ({least}–{most})"
