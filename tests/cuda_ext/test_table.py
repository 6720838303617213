"""The tables of a card: what is slower than before is red in either direction, and programs of one day share a file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cuda_ext import table as module
from cuda_ext.table import Line, Table

TIME = Line("norm", "8 x 8", "ours", 10.0, 9.0, 11.0, "us", {"GB/s": 94.34})
RATE = Line("training", "124m", "ours", 30_000.0, 29_000.0, 31_000.0, "tokens/s", {"MFU, %": 45.0, "goal, %": 45.0})


def red(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("\033[31m")]


@pytest.mark.parametrize(("line", "near", "far"), [(TIME, 10.4, 10.6), (RATE, 28_700.0, 28_500.0)])
def test_over_five_percent_slower_than_the_last_table_is_red(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Line, near: float, far: float
) -> None:
    for value, is_red in ((line.value, False), (near, False), (line.value, False), (far, True)):
        Table(tmp_path, "Card X-1", {}).add(replace(line, value=value))
        assert bool(red(capsys.readouterr().out)) == is_red
    Table(tmp_path, "Card X-1", {}).add(replace(line, value=line.value))
    quicker = replace(line, value=line.value * (2 if line is RATE else 0.5))
    Table(tmp_path, "Card X-1", {}).add(quicker)
    Table(tmp_path, "Card X-2", {}).add(replace(line, value=far))
    assert not red(capsys.readouterr().out)


def test_a_line_is_compared_with_the_newest_table_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for date, line in (("2026-01-02", RATE), ("2026-01-03", replace(RATE, value=20_000.0)), ("2026-01-04", TIME)):
        monkeypatch.setattr(module, "_today", lambda date=date: date)
        Table(tmp_path, "card", {}).add(line)
    capsys.readouterr()
    monkeypatch.setattr(module, "_today", lambda: "2026-01-05")
    Table(tmp_path, "card", {}).add(replace(RATE, value=10_000.0))
    assert "2.00 times slower than in the last table" in red(capsys.readouterr().out)[0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"2026-01-0{n}-card.{kind}" for n in (2, 3, 4, 5) for kind in ("json", "md")]


def test_programs_of_one_day_share_a_file_and_a_line_is_replaced(tmp_path: Path) -> None:
    Table(tmp_path, "Card X-1", {"torch": "2.11", "copies in GB/s": 2500.04}).add(TIME)
    Table(tmp_path, "Card X-1", {"torch": "2.11", "copies in GB/s": 2600.0}).add(RATE)
    table = Table(tmp_path, "Card X-1", {"torch": "2.11", "copies in GB/s": 2700.0})
    table.add(replace(TIME, value=9.5))
    content = json.loads(table.path.with_suffix(".json").read_text())
    assert [(line["what"], line["value"]) for line in content["lines"]] == [("norm", 9.5), ("training", 30_000.0)]
    head, *rest = table.path.read_text().splitlines()
    assert "card Card X-1" in head
    assert "torch 2.11, copies in GB/s 2,700.0." in head
    assert rest == [
        "",
        "| what | size | side | us | GB/s |",
        "|---|---|---|---|---|",
        "| norm | 8 x 8 | ours | 9.5 (9.0–11.0) | 94.3 |",
        "",
        "| what | size | side | tokens/s | MFU, % | goal, % |",
        "|---|---|---|---|---|---|",
        "| training | 124m | ours | 30,000 (29,000–31,000) | 45.0 | 45.0 |",
    ]
