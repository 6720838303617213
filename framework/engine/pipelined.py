"""Micro-batches through a pipeline: this rank's stages in the order of the schedule, states passed to the next rank.

The last stage has the heads, so losses and scores arise there; at the end it tells the others, and every rank of a
pipeline returns the same. Left out: the orders and the way states travel (`parallel.pipeline`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from framework.core.deadline import deadline
from framework.core.records import Metrics, Scores
from framework.engine.metrics import merge
from framework.engine.micro_batches import MicroBatch
from framework.engine.passes import LossOf
from framework.models.scorer import Scorer
from framework.parallel.collectives import Ranks
from framework.parallel.config import Schedule
from framework.parallel.pipeline import Line, Work, order


class Pipelined:
    """`stages`: (number, its part of the model) of each stage here; `total` stages in all. `places`: the ranks that
    share out the places of a state between matrices. See `passes.Carrier`."""

    def __init__(
        self,
        stages: Sequence[tuple[int, Scorer]],
        total: int,
        line: Line,
        ranks: Ranks,
        places: Ranks,
        schedule: Schedule,
        inside: Callable[[], AbstractContextManager[None]],
    ):
        self._stages, self._total, self._line, self._ranks = stages, total, line, ranks
        self._places, self._schedule, self._inside = places, schedule, inside
        self._first = self._first_learning()
        self.multiple = line.size if schedule is Schedule.INTERLEAVED else 1

    def losses(self, micros: Sequence[MicroBatch], loss_of: LossOf, backward: bool) -> tuple[Tensor, Metrics]:
        """See `Carrier`."""
        found: dict[int, tuple[Tensor, Metrics]] = {}

        def end(scorer: Scorer, index: int, hidden: Tensor) -> Tensor:
            loss, metrics = loss_of(partial(scorer, hidden=hidden), micros[index])
            found[index] = loss.detach().sum(), metrics
            return loss

        self._go(micros, end, backward)
        total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
        for index in range(len(found)):  # in the order of rows, whatever the schedule's
            loss, figures = found[index]
            total, metrics = total.to(loss.device) + loss, merge(metrics, figures)
        told: tuple[float, dict[str, list[float]]] = self._tell(
            (float(total), {name: [float(x) for x in pair] for name, pair in metrics.items()})
        )
        wide = partial(torch.tensor, dtype=torch.float64, device=micros[0].rows.inputs().tokens.device)
        return wide(told[0]), {name: (wide(pair[0]), wide(pair[1])) for name, pair in told[1].items()}

    def scores(self, micros: Sequence[MicroBatch]) -> list[Scores]:
        """See `Carrier`."""
        found: dict[int, Scores] = {}

        def end(scorer: Scorer, index: int, hidden: Tensor) -> Tensor:
            scores = scorer(micros[index].rows, hidden=hidden)
            found[index] = scores.to("cpu")
            return hidden

        self._go(micros, end, False)
        told: list[Scores] = self._tell([found[index] for index in range(len(found))])
        return [scores.to(micros[0].rows.inputs().tokens.device) for scores in told]

    def _go(self, micros: Sequence[MicroBatch], end: Callable[[Scorer, int, Tensor], Tensor], backward: bool) -> None:
        """All of this rank's work. What a stage took in and gave waits for its backward."""
        waiting: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        with self._inside():
            for work in order(self._schedule, self._line.rank, self._line.size, len(micros), backward):
                stage, key = self._stages[work.chunk][0], (work.chunk, work.micro)
                with deadline(f"{_said(work)} {work.micro} of {len(micros)} through stage {stage}"):
                    if work.forward:
                        taken, given = self._forward(work, micros[work.micro], end, backward)
                        if backward:
                            waiting[key] = taken, given
                    else:
                        self._backward(stage, *waiting.pop(key))
            with deadline("the end of its sends"):
                self._line.settle()

    def _forward(
        self, work: Work, micro: MicroBatch, end: Callable[[Scorer, int, Tensor], Tensor], backward: bool
    ) -> tuple[Tensor | None, Tensor]:
        stage, scorer = self._stages[work.chunk]
        hidden = None
        if stage:
            hidden = self._line.receive(self._shape(scorer, micro), stage - 1, forward=True)
            hidden.requires_grad_(backward and stage > self._first)
        if stage == self._total - 1:
            assert hidden is not None
            return hidden, end(scorer, work.micro, hidden)
        given = scorer(micro.rows, hidden=hidden)
        self._line.send(given, stage + 1, forward=True)
        return hidden, given

    def _backward(self, stage: int, taken: Tensor | None, given: Tensor) -> None:
        if stage < self._first:
            return
        gradient = None
        if stage < self._total - 1:
            gradient = self._line.receive(given.shape, stage + 1, forward=False)
        given.backward(gradient)
        if taken is not None and taken.requires_grad:
            assert taken.grad is not None
            self._line.send(taken.grad, stage - 1, forward=False)

    def _first_learning(self) -> int:
        """The first stage of all that holds anything that learns: no gradient goes further back. Collective."""
        mine = [number for number, scorer in self._stages if any(p.requires_grad for p in scorer.parameters())]
        first = torch.tensor([-min(mine, default=self._total)], device=self._line.device)
        return -int(self._ranks.largest(first, "the stages that stand still"))

    def _shape(self, scorer: Scorer, micro: MicroBatch) -> tuple[int, int, int]:
        """Of the states between two stages."""
        rows, length = scorer.sequence.cut(micro.rows.inputs()).tokens.shape
        return rows, length // self._places.size, scorer.model.config.hidden_size

    def _tell(self, what: Any) -> Any:
        """From the rank of the last stage to all of this pipeline."""
        told = [what]
        with deadline("the end of a pipeline"):
            dist.broadcast_object_list(told, group=self._ranks.group, group_src=self._ranks.size - 1)
        return told[0]


def _said(work: Work) -> str:
    return "micro-batch" if work.forward else "the gradient of micro-batch"
