"""The table of a card: shares of its ceilings by hand, what is slower than the last one, files to be read again."""

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
    assert (a.share, a.gigabytes, a.teraflops) == pytest.approx((0.5, 500, 0.5))
    assert b.share == pytest.approx(0.5)


def test_a_case_is_measured_side_by_side() -> None:
    calls: list[str] = []
    case = Case("c", lambda: calls.append("ours"), {"other": lambda: calls.append("other")})
    rows = list(measure(case, "cpu", laps=3))
    assert [row.side for row in rows] == ["ours", "other"]
    assert calls[:4] == ["ours", "other", "ours", "other"]
    assert all(0 < row.low <= row.median <= row.high for row in rows)


def test_what_is_slower_than_the_last_table_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took = {"quick": 10.0, "slow": 10.0}

    def rows(case: Case, device: str, laps: int) -> list[Row]:
        return [Row(case, "ours", took[case.name], 9.0, 11.0)]

    monkeypatch.setattr(roofline, "cases_of", lambda op, device: [Case(name, nothing, moved=10**6) for name in took])
    monkeypatch.setattr(roofline, "measure", rows)
    limits = Ceilings(1e12, 1e13)
    table = roofline.run(["op"], "cpu", "Card X-1", tmp_path, limits)
    assert "\033[31m" not in capsys.readouterr().out
    took |= {"quick": 10.4, "slow": 10.6}
    roofline.run(["op"], "cpu", "Card X-1", tmp_path, limits)
    red = [line for line in capsys.readouterr().out.splitlines() if line.startswith("\033[31m")]
    assert len(red) == 1
    assert "slow" in red[0]
    assert "1.06 times the last table's" in red[0]
    content = json.loads(table.with_suffix(".json").read_text())
    assert (content["card"], len(content["lines"])) == ("Card X-1", 2)
    assert "| op | slow | ours | 10.6 (9.0–11.0) | 94 | 0.0 | 9.4% |" in table.read_text().splitlines()
    assert roofline._last(tmp_path, "another card") == {}


def test_ceilings_are_measured() -> None:
    limits = roofline.ceilings("cpu", size=64, gigabytes=0.01)
    assert limits.copy > 1e8
    assert limits.product > 1e6
