"""Speed over the steps since it was last asked for, what stands between them left out."""

from unittest.mock import patch

from framework.engine.flops import Work
from framework.engine.pace import Pace


def test_tokens_and_mfu_of_two_steps_of_two_seconds() -> None:
    clock = iter([10.0, 12.0, 50.0, 52.0, 60.0, 61.0])
    pace = Pace(peak_flops=100.0)
    with patch("time.perf_counter", lambda: next(clock)):
        for _ in range(2):
            with pace:
                pace.add(Work(tokens=20, parameters=80.0, exact=100.0))
        assert pace.take() == {"tokens_per_second": 10.0, "mfu_parameters": 0.4, "mfu_exact": 0.5}
        with pace:
            pace.add(Work(tokens=5))
        assert pace.take()["tokens_per_second"] == 5.0


def test_no_mfu_where_no_peak_is_known() -> None:
    pace = Pace(None)
    with pace:
        pace.add(Work(1, 1, 1))
    assert set(pace.take()) == {"tokens_per_second"}
