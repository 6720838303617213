"""A task judges text, is found by name, and finds its corpus."""

import re
import subprocess
import sys

import pytest

import framework.tasks
from framework.core.errors import DataError, UsageError
from framework.core.records import Message
from framework.core.registry import names, register
from framework.tasks.task import Task, corpus_folder, get


def sums() -> Task[int]:
    return Task(
        name="sum",
        examples=lambda part: [4],
        prompt=lambda n: (Message("user", "2+2="),),
        parse=lambda text: (re.findall(r"[0-9]+", text) or [None])[0],
        score=lambda n, answer: float(int(answer) == n),
    )


def test_judging_parses_then_scores() -> None:
    assert [sums().judge(4, text) for text in ("it is 4", "5", "no number")] == [1.0, 0.0, 0.0]


def test_a_registered_task_is_found_and_an_unknown_one_is_answered_with_the_nearest() -> None:
    register("task", "tests_sum")(sums)
    assert get("tests_sum").name == "sum"
    with pytest.raises(UsageError, match="did you mean 'verse_form'"):
        get("verse_from")


def test_every_task_answers_to_its_own_name() -> None:
    get("verse_form")
    ours = [name for name in names("task") if not name.startswith("tests_")]
    assert ours == ["assigned_rhyme", "tone_pattern", "verse_form"]
    assert [get(name).name for name in ours] == ours


def test_the_room_exposes_get_without_loading_torch() -> None:
    assert framework.tasks.get is get
    code = "import framework.tasks, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_corpus_is_named_with_those_that_are_there() -> None:
    assert (corpus_folder("tang") / "train.txt").exists()
    with pytest.raises(DataError, match=r"corpus 'song' is not there; there are: .*tang"):
        corpus_folder("song")
