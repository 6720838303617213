"""What a pipeline's rank keeps while micro-batches go through. That its answer is one process's: `test_lattice`."""

import weakref
from typing import Any

import pytest
import torch.distributed.fsdp  # noqa: F401  imported once, before the ranks are forked
from torch import Tensor

from framework.core.records import Counts, Metrics, Rows, Scores
from framework.core.runtime import Runtime
from framework.parallel.config import ParallelConfig, Schedule
from tests.distributed import run_ranks
from tests.engine.cases import build, language_loss, packed

MICROS = 6


def _alive(references: list[Any]) -> int:
    return sum(reference() is not None for reference in references)


def _watch(runtime: Runtime, schedule: Schedule) -> tuple[list[int], list[int], list[int]]:
    """On the last stage: states taken in, and scores given, that live as each micro-batch's loss is made; and both
    afterwards."""
    engine = build(runtime, ParallelConfig("pp", pipeline=0, schedule=schedule), micro_size=1)
    taken, given, taken_alive, given_alive = [], [], [], []

    def take(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        taken.append(weakref.ref(keywords["hidden"]))

    def loss(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        given.append(weakref.ref(scores.log_probs))
        taken_alive.append(_alive(taken))
        given_alive.append(_alive(given))
        return language_loss(scores, rows, counts)

    if runtime.rank == 1:
        engine.scorers[0].register_forward_pre_hook(take, with_kwargs=True)
    engine.forward_backward(packed(MICROS), loss)
    return taken_alive, given_alive, [_alive(taken), _alive(given)]


@pytest.mark.parametrize(("schedule", "most"), [(Schedule.ONE_F_ONE_B, 2), (Schedule.GPIPE, MICROS)])
def test_what_has_gone_back_is_let_go(schedule: Schedule, most: int) -> None:
    """One forward, one backward: nothing of earlier micro-batches lives on, inputs or scores, and at the end of either
    schedule nothing at all."""
    taken, given, after = run_ranks(_watch, 2, schedule)[1]
    assert len(taken) == MICROS
    assert max(taken) <= most
    assert max(given) <= most
    assert after == [0, 0]
