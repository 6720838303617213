"""Law Layout over the lattice: every layout of up to four ranks gives one process's answer; nightly up to eight.

The page docs/layouts.md must say what is found here.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from framework.engine.config import Precision
from tests.distributed import run_ranks
from tests.engine.lattice import (
    AXES,
    LAYOUTS,
    PRETRAINING,
    UPDATES,
    WORLDS,
    ZERO,
    Course,
    Deviation,
    Found,
    Layout,
    Question,
    alone,
    bound,
    compare,
    copies,
    lattice,
    questions,
    refused,
    save_one,
    visit,
    worst,
)
from tests.engine.layout_page import DOC, REFUSED, Row, row_of

LOSSES = {Precision.FP64: 1e-10, Precision.FP32: 1e-5, Precision.BF16: 5e-3}


class One:
    """One process's answers, each computed once, and the hashes of its checkpoint."""

    def __init__(self, folder: Path):
        self.folder, self.hashes = folder, save_one(folder)
        self.answers: dict[Question, Course] = {}

    def answer(self, question: Question) -> Course:
        if question not in self.answers:
            self.answers[question] = alone(*question)
        return self.answers[question]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> One:
    return One(tmp_path_factory.mktemp("lattice"))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What this session has found."""
    return []


def hold(layout: Layout, asked: list[Question], one: One) -> list[Found]:
    """Run it, and hold everything to its bound."""
    answers = {question: one.answer(question) for question in asked}
    found = run_ranks(visit, layout.world, layout, answers, one.folder, timeout_s=280)
    for question in asked:
        measured = worst(found, question)
        print(f"{layout.name}, {question[0]}, {question[1].value}: {measured}")
        assert measured.start, "law Init"
        assert within(measured, question[1]), (layout.name, question, measured)
    assert all(rank.hashes == one.hashes for rank in found)
    return found


def within(measured: Deviation, precision: Precision) -> bool:
    tolerance = bound(precision)
    later = {Precision.FP64: tolerance, Precision.FP32: 100 * tolerance, Precision.BF16: float("inf")}[precision]
    return measured.loss <= LOSSES[precision] and measured.gradient <= tolerance and measured.after <= later


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[layout.name.replace(" ", "-") for layout in LAYOUTS])
def test_a_layout_gives_one_process_s_answer(index: int, one: One, rows: list[Row]) -> None:
    rows.append(row_of(LAYOUTS[index], hold(LAYOUTS[index], questions(index), one)))


@pytest.mark.parametrize("index", range(len(ZERO)), ids=[f"{layout.name}-{layout.world}" for layout in ZERO])
def test_zero_gives_one_process_s_answer(index: int, one: One, rows: list[Row]) -> None:
    pytest.importorskip("deepspeed")
    asked = questions(len(LAYOUTS) + index)
    rows.append(row_of(ZERO[index], hold(ZERO[index], asked, one)))


def test_the_page_says_what_was_found(rows: list[Row]) -> None:
    """Deviations are a machine's own; layouts, collectives, bytes and refusals are not. After a change write it anew:
    python -m tests.engine.layout_page"""
    if len(rows) < len(LAYOUTS) + len(ZERO):
        pytest.skip("not all layouts were run")
    table, no = DOC.read_text(encoding="utf-8").split(REFUSED)
    for row in rows:
        assert f"| {row.fixed} |" in table
    assert table.count("| equal |") == len(rows)
    for world in WORLDS:
        for layout, line in refused(world):
            assert f"| {layout.name} | {layout.world} | {line} |" in no


def test_the_measure_sees_a_wrong_answer(one: One) -> None:
    """A gradient averaged over two ranks, and one number of the smallest tensor off by a millionth."""
    good = one.answer((PRETRAINING, Precision.FP64))
    halved = [[replace(piece, tensor=piece.tensor / 2) for piece in step] for step in good.gradients]
    wrong = [copies(step) for step in good.gradients]
    next(piece for piece in wrong[0] if piece.name == "norm.weight").tensor[3] *= 1 + 1e-6
    assert within(compare(good, good), Precision.FP64)
    for gradients in (halved, wrong):
        assert not within(compare(replace(good, gradients=gradients), good), Precision.FP64)


def test_each_axis_meets_each_update() -> None:
    """The pairwise cover."""
    met = {
        (axis, name)
        for index, layout in enumerate(LAYOUTS)
        for axis in AXES
        if f"{axis} " in layout.name
        for name, _ in questions(index)
    }
    assert met == {(axis, name) for axis in AXES for name in UPDATES}


BEYOND = [layout for world in (5, 6, 7, 8) for layout in lattice(world)]


@pytest.mark.nightly
@pytest.mark.parametrize("layout", BEYOND, ids=lambda layout: f"{layout.world}-{layout.name.replace(' ', '-')}")
def test_up_to_eight_ranks(layout: Layout, one: One) -> None:
    hold(layout, [(PRETRAINING, precision) for precision in Precision], one)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_every_update_under_every_layout(layout: Layout, one: One) -> None:
    hold(layout, [(name, precision) for name in UPDATES for precision in (Precision.FP64, Precision.FP32)], one)
