"""Status for people: durations by hand, a dead process told from a living one, no crash on strange files."""

import os
from pathlib import Path

import pytest

from framework.core.errors import UsageError
from framework.tracking.status import STATUS, Status, describe, duration, read_status, write_status


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (7.4, "7 s"),
        (59.6, "1:00"),
        (75, "1:15"),
        (600, "10:00"),
        (3675, "1:01:15"),
        (90000, "1 day, 1:00:00"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_status_comes_back(tmp_path: Path) -> None:
    write_status(tmp_path, Status(stage="sft", step=3, total=10, parents={"a": "b"}))
    found = read_status(tmp_path)
    assert found is not None
    assert (found.stage, found.step, found.parents, found.pid) == ("sft", 3, {"a": "b"}, os.getpid())


def test_a_person_is_told(tmp_path: Path) -> None:
    write_status(tmp_path, Status(step=120, total=400, eta_seconds=75.0, attempt=2, seconds=30.0))
    status = read_status(tmp_path)
    assert status is not None
    text = describe(tmp_path, now=status.updated + 5)
    assert text.endswith(
        ": running, step 120 of 400 (30%), 1:15 to go, attempt 2, 30 s of work\n  last written 5 s ago"
    )
    write_status(tmp_path, Status(state="failed", last_error="the disk is full"))
    assert "failed" in describe(tmp_path)
    assert "last error: the disk is full" in describe(tmp_path)


def test_a_killed_process_is_told_from_a_living_one(tmp_path: Path) -> None:
    write_status(tmp_path, Status())
    text = (tmp_path / STATUS).read_text()
    (tmp_path / STATUS).write_text(text.replace(f'"pid": {os.getpid()}', '"pid": 99999999'))
    assert "killed?" in describe(tmp_path)


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        describe(tmp_path)
    (tmp_path / STATUS).write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        describe(tmp_path)


def test_fields_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text('{"state": "finished", "mood": "fine"}')
    assert read_status(tmp_path) == Status(state="finished")
