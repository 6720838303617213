"""Rows through a module: cut into micro-batches, scored, their losses added up and taken backward, figures reduced.

What every engine shares. Left out: the update (the engine), and what carries one micro-batch after another (`Straight`
here; a pipeline cuts a module into stages).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from framework.core.deadline import deadline
from framework.core.records import Counts, Metrics, Rows, Scores, count
from framework.engine.balancing import Balancing
from framework.engine.dropping import Dropping
from framework.engine.metrics import merge, reduce_over
from framework.engine.micro_batches import MicroBatch, cut, join, trim, without_empty
from framework.engine.protocol import LossFn
from framework.parallel.collectives import Ranks

Score = Callable[..., Any]  # a Scorer's forward, however it is wrapped
LossOf = Callable[[Score, MicroBatch], tuple[Tensor, Metrics]]


class Carrier(Protocol):
    """Carries micro-batches of one shape through a module, the same number of them on every rank. Collective."""

    multiple: int  # that number must be one of it

    def losses(self, micros: Sequence[MicroBatch], loss_of: LossOf, backward: bool) -> tuple[Tensor, Metrics]:
        """(sum of the losses, metrics added up) over `micros`; with `backward`, gradients are added too."""

    def scores(self, micros: Sequence[MicroBatch]) -> list[Scores]:
        """The scores of each, without gradients."""


class Straight:
    """One micro-batch after another through a whole module. `inside` is entered around forward and backward."""

    multiple = 1

    def __init__(
        self,
        score: Score,
        backward: Callable[[Tensor], None] = Tensor.backward,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._score, self._backward, self._inside = score, backward, inside

    def losses(self, micros: Sequence[MicroBatch], loss_of: LossOf, backward: bool) -> tuple[Tensor, Metrics]:
        """See `Carrier`."""
        total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
        with self._inside():
            for index, micro in enumerate(micros):
                with deadline(f"micro-batch {index} of {len(micros)}"):
                    loss, figures = loss_of(self._score, micro)
                    if backward:
                        self._backward(loss)
                total = total.to(loss.device) + loss.detach().sum()
                metrics = merge(metrics, figures)
        return total, metrics

    def scores(self, micros: Sequence[MicroBatch]) -> list[Scores]:
        """See `Carrier`."""
        with self._inside():
            return [self._score(micro.rows) for micro in micros]


class Passes:
    """Forward and backward of an engine, over `ranks`, its data ranks. `loss` adds up what backward went through.
    `balance` is told before backward how many sequences the step holds, and asked what it saw; `dropping` which rows
    are coming."""

    def __init__(
        self,
        carrier: Carrier,
        ranks: Ranks,
        micro_size: int,
        device: torch.device,
        balance: Balancing | None = None,
        dropping: Dropping | None = None,
    ):
        self._balance, self._dropping = balance, dropping
        self._carrier, self._ranks, self._micro_size, self._device = carrier, ranks, micro_size, device
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def run(
        self, rows: Rows, loss_fn: LossFn, counts: Counts | None, backward: bool, phase: str, step: int = 0
    ) -> Metrics:
        """`protocol.Engine.forward_backward`, or `measure` without `backward`. `phase` names the step in errors."""
        kept = without_empty(rows)
        with deadline(phase):
            number, first, everywhere = self._agree(kept, counts)
            if backward and self._balance is not None:
                self._balance.begin(float(everywhere.sequences + everywhere.pairs))  # a pair is one, and two
            micros = list(cut(kept.to(self._device), self._micro_size, number))
            loss: LossOf = partial(loss_of, loss_fn, everywhere)
            if backward and self._dropping is not None:
                loss = self._dropping.around(loss, step, first)
            total, metrics = self._carrier.losses(micros, loss, backward)
            if backward:
                self.loss += total
                metrics = metrics if self._balance is None else metrics | self._balance.figures()
            return reduce_over(self._ranks, metrics)

    def infer(self, rows: Rows) -> Scores:
        """See `protocol.Engine`. The scores come back to where the rows were."""
        with torch.no_grad(), deadline("inference"):
            number = self._common(self._gather(self._num_micro_batches(rows)))
            micros = list(cut(rows.to(self._device), self._micro_size, number))
            parts = list(zip(self._carrier.scores(micros), micros, strict=True))
        return join(parts).to(rows.inputs().tokens.device)

    def _agree(self, rows: Rows, counts: Counts | None) -> tuple[int, int, Counts]:
        """(micro-batches that every rank must go through, rows of the ranks before this one where dropout numbers them,
        counts over all)."""
        mine = count(rows) if counts is None else counts
        known = [int(n) for n in (mine.tokens, mine.sequences, mine.pairs)]
        rows_too = [] if self._dropping is None else [len(rows)]
        table = self._gather(self._num_micro_batches(rows), *known, *rows_too)
        tokens, sequences, pairs = table[:, 1:4].sum(dim=0).split(1)
        first = int(table[: self._ranks.rank, 4:].sum())
        return self._common(table[:, :1]), first, Counts(tokens=tokens, sequences=sequences, pairs=pairs)

    def _common(self, numbers: Tensor) -> int:
        """Micro-batches for all: as many as the rank with most rows has, at least one, and what the carrier wants."""
        return -(-max(1, int(numbers.max())) // self._carrier.multiple) * self._carrier.multiple

    def _gather(self, *numbers: int) -> Tensor:
        """[data ranks, numbers] int64."""
        return self._ranks.gather(torch.tensor(numbers, device=self._device), "row counts")

    def _num_micro_batches(self, rows: Rows) -> int:
        return -(-len(rows) // self._micro_size)


def loss_of(loss_fn: LossFn, counts: Counts, score: Score, micro: MicroBatch) -> tuple[Tensor, Metrics]:
    """The loss of one micro-batch. A rank that has run out of rows goes along with an empty one, which counts zero
    times."""
    with_entropy = getattr(loss_fn, "needs_entropy", False)
    if getattr(loss_fn, "pointwise", False):
        loss, metrics = score(micro.rows, token_loss=partial(_with_counts, loss_fn, counts), with_entropy=with_entropy)
    else:
        scores = score(micro.rows, with_entropy=with_entropy)
        kept = micro.filled or len(micro.rows)
        loss, metrics = loss_fn(trim(scores, micro.rows, kept), micro.rows.select(slice(0, kept)), counts)
    if micro.filled:
        return loss, metrics
    return loss * 0, {name: (total * 0, weight * 0) for name, (total, weight) in metrics.items()}


def _with_counts(
    loss_fn: Any, counts: Counts, log_probs: Tensor, entropy: Tensor | None, rows: Rows
) -> tuple[Tensor, Metrics]:
    """A pointwise loss as the Scorer calls it."""
    loss, metrics = loss_fn(log_probs, entropy, rows, counts)
    return loss, metrics
