"""The schedules against closed forms worked by hand and against transformers', where both mean the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import optimization

from framework.optim.config import OptimConfig, Schedule
from framework.optim.schedule import learning_rate, num_steps

TOTAL = 50


def rates(config: OptimConfig, total: int = TOTAL) -> list[float]:
    return [learning_rate(config, step, total) for step in range(total)]


def theirs(name: str, **arguments: object) -> list[float]:
    """The rates at which a transformers schedule runs TOTAL steps from a base rate of 2.0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = getattr(optimization, name)(optimizer, **arguments)
    seen = []
    for _ in range(TOTAL):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


def test_numbers_worked_by_hand() -> None:
    linear = OptimConfig(lr=8.0, schedule=Schedule.LINEAR, warmup=2, final_lr=0.0)
    assert rates(linear, 6) == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    cosine = OptimConfig(lr=8.0, schedule=Schedule.COSINE, warmup=0, final_lr=0.0)
    assert rates(cosine, 4) == pytest.approx([8.0, 4 + 4 * math.sqrt(0.5), 4.0, 4 - 4 * math.sqrt(0.5)])
    wsd = OptimConfig(lr=8.0, schedule=Schedule.WSD, warmup=0.2, decay=0.4, final_lr=0.5)
    assert rates(wsd, 10) == pytest.approx([4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 7.0, 6.0, 5.0])
    constant = OptimConfig(lr=8.0, schedule=Schedule.CONSTANT, warmup=4)
    assert rates(constant, 6) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("config", "name", "arguments"),
    [
        (
            OptimConfig(lr=2.0, schedule=Schedule.COSINE, warmup=5, final_lr=0.1),
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_warmup_steps": 5, "num_training_steps": TOTAL, "min_lr_rate": 0.1},
        ),
        (
            OptimConfig(lr=2.0, schedule=Schedule.LINEAR, warmup=0.1, final_lr=0.0),
            "get_linear_schedule_with_warmup",
            {"num_warmup_steps": 5, "num_training_steps": TOTAL},
        ),
        (
            OptimConfig(lr=2.0, schedule=Schedule.CONSTANT, warmup=5),
            "get_constant_schedule_with_warmup",
            {"num_warmup_steps": 5},
        ),
        (
            OptimConfig(
                lr=2.0, schedule=Schedule.WSD, warmup=5, decay=0.2, final_lr=0.0
            ),  # theirs also starts at final_lr
            "get_wsd_schedule",
            {
                "num_warmup_steps": 5,
                "num_decay_steps": 10,
                "num_training_steps": TOTAL,
                "decay_type": "linear",
                "min_lr_ratio": 0.0,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_agrees_after_warmup_and_stands_one_step_behind_in_it(
    config: OptimConfig, name: str, arguments: dict[str, object]
) -> None:
    ours, others = rates(config), theirs(name, **arguments)
    assert ours[5:] == pytest.approx(others[5:], rel=1e-12)
    assert ours[:4] == pytest.approx(others[1:5], rel=1e-12)
    assert others[0] == 0.0


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(list(Schedule)),
    total=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 400)),
    decay=st.one_of(st.floats(0, 0.99), st.integers(1, 400)),
    final=st.floats(0, 1),
)
def test_rates_stay_between_zero_and_the_peak(
    schedule: Schedule, total: int, warmup: float, decay: float, final: float
) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup=warmup, decay=decay, final_lr=final)
    seen, first = rates(config, total), num_steps(warmup, total)
    assert all(0 < rate <= 1 + 1e-12 for rate in seen)
    assert seen[: max(1, first)] == sorted(seen[: max(1, first)])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(seen[first:], seen[first + 1 :]))
