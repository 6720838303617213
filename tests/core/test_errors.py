"""Errors: exit codes, the place of a data error, and the nearest name."""

import doctest

import pytest

from framework.core import errors
from framework.core.errors import (
    CheckpointError,
    DataError,
    DeadlineError,
    FrameworkError,
    NonFiniteError,
    UsageError,
    WorkerError,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FrameworkError, 1),
        (CheckpointError, 1),
        (NonFiniteError, 1),
        (WorkerError, 1),
        (DeadlineError, 1),
        (UsageError, 2),
        (DataError, 2),
    ],
)
def test_exit_codes(error: type[FrameworkError], code: int) -> None:
    assert error("what happened").exit_code == code
    assert str(error("what happened")) == "what happened"


def test_a_data_error_names_file_and_line() -> None:
    assert str(DataError("no field 'text'", "a.jsonl", 3)) == "a.jsonl:3: no field 'text'"
    assert str(DataError("is empty", "a.jsonl")) == "a.jsonl: is empty"


def test_a_missed_deadline_is_a_workers_failure() -> None:
    assert issubclass(DeadlineError, WorkerError)


def test_the_docstring_example() -> None:
    assert doctest.testmod(errors).failed == 0
    assert doctest.testmod(errors).attempted == 1


def test_nearest_without_anything_close_lists_what_there_is() -> None:
    assert nearest("zzz", ["cosine", "linear"]) == "Choose one of: cosine, linear"


def test_nearest_of_many_names_only_the_close_one() -> None:
    many = [f"key_{i:02}" for i in range(30)]
    assert nearest("key_7", many) in {f"did you mean '{name}'?" for name in many}
    assert nearest("zzz", many) == "there are 30 to choose from"
