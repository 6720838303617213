"""The harness itself: a rank that fails or hangs fails the test with its traceback, and nobody waits for the rest."""

import time

import pytest

from framework.core.runtime import Runtime
from tests.distributed import run_ranks


def _fail_on_one(runtime: Runtime) -> int:
    if runtime.rank == 1:
        raise ValueError("rank 1's own error")
    return runtime.rank


def _hang_on_one(runtime: Runtime) -> None:
    if runtime.rank == 1:
        time.sleep(60)


def test_what_ranks_return_comes_by_rank() -> None:
    assert run_ranks(lambda runtime, x: (runtime.rank, runtime.world_size, x), 3, "x") == [
        (r, 3, "x") for r in range(3)
    ]


def test_a_failing_rank_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 left with 1.*ValueError: rank 1's own error"):
        run_ranks(_fail_on_one, 2)


def test_a_hanging_rank_is_ended_and_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 left with -9.*_hang_on_one"):
        run_ranks(_hang_on_one, 2, timeout_s=2.0)
