"""Chart geometry by hand: ticks, numbers, pixels, gaps, and no crash on flat or single-point series."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from framework.tracking.chart import HEIGHT, WIDTH, draw, number, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 100, [0, 20, 40, 60, 80, 100]), (-3, 9, [-2, 0, 2, 4, 6, 8]),
     (1e-5, 3e-5, [1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5])],
)  # fmt: skip
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_lie_within_and_are_few(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    assert 1 <= len(found) <= 2 * about
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.14159, "3.142"), (2.0, "2"), (1.2e6, "1.2M"), (14200, "14.2k"), (3e-5, "3e-05"), (-25e9, "-25B"), (0, "0")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_a_line_by_hand() -> None:
    chart = draw("loss", {"train": [(0, 0.0), (1, 1.0)]})
    assert chart is not None
    assert chart.lines[0].path == "M44.0 146.3 L328.0 17.7"  # 6 % of room above and below in 144 pixels
    assert chart.lines[0].end == (328.0, 17.7)
    assert chart.lines[0].last == "1"
    assert chart.lines[0].raw == ""


def test_the_pen_is_lifted_over_what_is_not_finite() -> None:
    chart = draw("loss", {"": [(0, 1.0), (1, None), (2, 3.0), (3, 2.0), (4, None)]})
    assert chart is not None
    assert [word[0] for word in chart.lines[0].path.split() if word[0] in "ML"] == ["M", "M", "L"]
    assert chart.lines[0].last == "2"


def test_nothing_to_draw_is_none() -> None:
    assert draw("a", {}) is None
    assert draw("a", {"x": [(1, None)]}) is None
    both = draw("a", {"x": [(1, None)], "y": [(1, 2.0)]})
    assert both is not None
    assert [line.name for line in both.lines] == ["y"]


@given(st.lists(st.floats(-1e9, 1e9) | st.none(), min_size=1, max_size=700))
@example([0.0, 5e-324])
def test_everything_stays_inside_the_picture(values: list[float | None]) -> None:
    chart = draw("x", {"a": list(enumerate(values))})
    for line in chart.lines if chart else ():
        pairs = (line.path + " " + line.raw).replace("M", "").replace("L", "").split()
        assert all(0 <= float(x) <= WIDTH for x in pairs[::2])
        assert all(0 <= float(y) <= HEIGHT for y in pairs[1::2])
        assert len(line.path.split()) <= 2 * 300


def test_long_noisy_series_are_thinned_and_smoothed() -> None:
    chart = draw("x", {"a": [(s, float(s % 2)) for s in range(3000)]})
    assert chart is not None
    assert len(chart.lines[0].raw.split()) == 2 * 300
    heights = {float(y) for y in chart.lines[0].path.split()[1::2]}
    assert max(heights) - min(heights) < 1  # the mean of 0 and 1 everywhere
