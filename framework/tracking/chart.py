"""The geometry of a small line chart: figures over steps become paths and ticks. Pure; the template draws it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 176
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 22
_TELLING = 1e-12
_MOST_POINTS = 300  # a path longer than the screen is wide shows nothing more
_NOISY = 40  # from so many points on, a smoothed line is drawn over the raw one

Points = Sequence[tuple[float, float | None]]  # (step, value); None where the value was not finite


@dataclass(frozen=True)
class Tick:
    """A label at a pixel, along one axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series: `path` is SVG path data, `raw` the unsmoothed one behind it (may be empty), `end` its last point."""

    name: str
    path: str
    raw: str
    end: tuple[float, float]
    last: str


@dataclass(frozen=True)
class Chart:
    """What the template needs: lines, and ticks in pixels of a WIDTH x HEIGHT picture."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    floor: int = HEIGHT - _BOTTOM


def draw(title: str, series: dict[str, Points]) -> Chart | None:
    """A chart of named series; None where no series has a finite value."""
    thin = {name: _thinned(points) for name, points in series.items()}
    known = [(x, y) for points in thin.values() for x, y in points if y is not None]
    if not known:
        return None
    x_low, x_high = _span([x for x, _ in known])
    y_low, y_high = _span([y for _, y in known], room=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    def line(name: str, points: Points) -> Line:
        noisy = len(points) >= _NOISY
        smooth = _smoothed(points) if noisy else points
        x, y = next((x, y) for x, y in reversed(smooth) if y is not None)
        last = next(value for _, value in reversed(series[name]) if value is not None)
        return Line(name, _path(smooth, place), _path(points, place) if noisy else "", place(x, y), number(last))

    return Chart(
        title,
        tuple(line(name, points) for name, points in thin.items() if any(y is not None for _, y in points)),
        tuple(Tick(place(x, y_low)[0], number(x)) for x in ticks(x_low, x_high, 5)),
        tuple(Tick(place(x_low, y)[1], number(y)) for y in ticks(y_low, y_high, 5)),
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten. ticks(-3, 9, 5) -> -2, 0, ... 8."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda multiple: abs(math.log(multiple * power / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """For a person: 3.14159 -> "3.142", 1200000 -> "1.2M", 0.00003 -> "3e-05", 2.0 -> "2"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _thinned(points: Points) -> Points:
    """At most _MOST_POINTS, neighbours averaged."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(_mean([x for x, _ in g]), _mean(known) if (known := _known(g)) else None) for g in groups]


def _smoothed(points: Points) -> Points:
    """The mean of a window around each point; at the ends, of what the window still holds."""
    reach = max(1, len(points) // 24)
    smooth = []
    for i, (x, _) in enumerate(points):
        known = _known(points[max(0, i - reach) : i + reach + 1])
        smooth.append((x, _mean(known) if known else None))
    return smooth


def _known(points: Points) -> list[float]:
    return [y for _, y in points if y is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _span(values: Sequence[float], room: float = 0.0) -> tuple[float, float]:
    """Lowest and highest with some room; never empty."""
    low, high = min(values), max(values)
    if high - low <= _TELLING * max(abs(low), abs(high), _TELLING):  # nothing that a picture, or a float, could divide
        half = abs(low) / 2 if abs(low) > _TELLING else 1.0
        return low - half, high + half
    return low - room * (high - low), high + room * (high - low)


def _path(points: Points, place: Callable[[float, float], tuple[float, float]]) -> str:
    """SVG path data; the pen is lifted over what is not known."""
    words, down = [], False
    for x, y in points:
        if y is not None:
            across, at = place(x, y)
            words.append(f"{'L' if down else 'M'}{across} {at}")
        down = y is not None
    return " ".join(words)
