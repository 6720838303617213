"""Kernels beside a card's ceilings: shares by hand, sides in turns, and how the lines come into the card's table."""

import json
from pathlib import Path

import pytest

from cuda_ext import roofline
from cuda_ext.measure import Case, Row, measure
from cuda_ext.roofline import Ceilings


def nothing() -> None:
    pass


def test_a_share_by_hand() -> None:
    """A card of 1 TB/s and 10 TFLOP/s: its ridge is at 10 operations a byte."""
    limits = Ceilings(copy=1e12, product=1e13)
    assert limits.ridge == 10
    moving, computing = Case("a", nothing, moved=10**6, flops=10**6), Case("b", nothing, moved=10**6, flops=2 * 10**7)
    rows = [Row(moving, "ours", 2.0, 1.5, 3.0), Row(computing, "ours", 4.0, 3.0, 5.0)]
    a, b = roofline.lines("op", rows, limits)
    assert a.figures == pytest.approx({"GB/s": 500, "TFLOP/s": 0.5, "% of the card": 50})
    assert b.figures["% of the card"] == pytest.approx(50)


def test_a_case_is_measured_side_by_side() -> None:
    calls: list[str] = []
    case = Case("c", lambda: calls.append("ours"), {"other": lambda: calls.append("other")})
    rows = list(measure(case, "cpu", laps=3))
    assert [row.side for row in rows] == ["ours", "other"]
    assert calls[:4] == ["ours", "other", "ours", "other"]
    assert all(0 < row.low <= row.median <= row.high for row in rows)


def test_every_case_is_a_line_of_the_card_s_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "cases_of", lambda op, device: [Case(f"of {op}", nothing, moved=10**6)])
    monkeypatch.setattr(roofline, "measure", lambda case, device, laps: [Row(case, "ours", 10.6, 9.0, 11.0)])
    table = roofline.run(["a", "b"], "cpu", "Card X-1", tmp_path, Ceilings(1e12, 1e13))
    content = json.loads(table.with_suffix(".json").read_text())
    assert (content["card"], content["copies in GB/s"], len(content["lines"])) == ("Card X-1", 1000, 2)
    assert "| b | of b | ours | 10.6 (9.0–11.0) | 94.3 | 0.0 | 9.4 |" in table.read_text().splitlines()


def test_ceilings_are_measured() -> None:
    limits = roofline.ceilings("cpu", size=64, gigabytes=0.01)
    assert limits.copy > 1e8
    assert limits.product > 1e6
