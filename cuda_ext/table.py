"""The tables of a card, a JSON and a Markdown file a date: what was measured on it, and what has become slower since.

A table grows line by line and is written after each, so that nothing is lost where a later measurement fails; programs
of one day share it (kernels by `roofline`, training and decoding by `tests.benchmarks.end_to_end`). What a line took
before is looked up in all earlier tables of the card, the newest first. Left out: comparing cards.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

_SLOWER = 1.05
_RED, _PLAIN = "\033[31m", "\033[0m"

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Line:
    """One side of one case: the median, the 10th and the 90th percentile. Of a `unit` a second ("tokens/s") more is
    better, of another ("us") less. `figures` stand beside it, each in the unit that it is named by.

    Example: Line("rms_norm", "8192 x 4096 bf16", "ours", 61.0, 60.0, 63.0, "us", {"GB/s": 2200.0}).
    """

    what: str
    case: str
    side: str
    value: float
    low: float
    high: float
    unit: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.what, self.case, self.side

    def slowdown(self, before: float) -> float:
        """How many times slower this is than the value `before`."""
        return before / self.value if self.unit.endswith("/s") else self.value / before

    def __str__(self) -> str:
        beside = ", ".join(f"{_number(number)} {unit}" for unit, number in self.figures.items())
        return f"{self.what:<18} {self.case:<36} {self.side:<22} {_number(self.value):>10} {self.unit}  {beside}"


class Table:
    """Today's table of `card` in `folder`, as far as it has been written. `facts` of the card stand at its head."""

    def __init__(self, folder: Path, card: str, facts: Mapping[str, float | str]):
        name = "".join(letter if letter.isalnum() else "-" for letter in card.lower())
        self._path = folder / f"{_today()}-{name}.json"
        self._before: dict[Key, float] = {}
        self._lines: dict[Key, Line] = {}
        for path in sorted(folder.glob(f"[0-9]*-[0-9]*-[0-9]*-{name}.json")):
            self._lines = {line.key: line for line in _read(path)}
            self._before |= {key: line.value for key, line in self._lines.items()}
            if path != self._path:
                self._lines = {}
        self._head = {"card": card, "date": _today(), **facts}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """Of the Markdown file."""
        return self._path.with_suffix(".md")

    def add(self, line: Line) -> None:
        """Print it, in red where it is over 5 % slower than before, and write the files anew."""
        print(self._shown(line), flush=True)
        self._lines[line.key] = line
        content = self._head | {"lines": [asdict(line) for line in self._lines.values()]}
        _write(self._path, json.dumps(content, indent=1))
        _write(self.path, "\n".join(self._markdown()))

    def _shown(self, line: Line) -> str:
        slowdown = line.slowdown(self._before[line.key]) if line.key in self._before else 0.0
        if slowdown <= _SLOWER:
            return str(line)
        return f"{_RED}{line}, {slowdown:.2f} times slower than in the last table{_PLAIN}"

    def _markdown(self) -> list[str]:
        """A table for all lines that have the same columns."""
        head = (f"{name} {_number(fact) if isinstance(fact, float) else fact}" for name, fact in self._head.items())
        text = [f"{', '.join(head)}. The median, the 10th and the 90th percentile in brackets."]
        groups: dict[tuple[str, ...], list[Line]] = {}
        for line in self._lines.values():
            groups.setdefault((line.unit, *line.figures), []).append(line)
        for columns, group in groups.items():
            text += ["", f"| what | size | side | {' | '.join(columns)} |", f"|{'---|' * (3 + len(columns))}"]
            text += map(_row, group)
        return text


def _read(path: Path) -> list[Line]:
    try:
        return [Line(**content) for content in json.loads(path.read_text())["lines"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of a card ({error}); move it away, or mend it") from error


def _write(path: Path, text: str) -> None:
    """All of it, or what stood there before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n")
    os.replace(beside, path)


def _row(line: Line) -> str:
    value = f"{_number(line.value)} ({_number(line.low)}–{_number(line.high)})"
    return f"| {' | '.join([*line.key, value, *map(_number, line.figures.values())])} |"


def _today() -> str:
    return date.today().isoformat()


def _number(number: float) -> str:
    return f"{number:,.1f}" if abs(number) < 1e4 else f"{number:,.0f}"
