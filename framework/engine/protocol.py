"""What an engine is: one Scorer, its optimizer, and the ranks it lies on. Stages and workers know only this."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from framework.core.records import Box, Counts, Metrics, ReadBox, Rows, Scores
from framework.engine.flops import Work

LossFn = Callable[[Scores, Rows, Counts], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step did. `skipped`: the loss or the gradient was not finite and nothing was changed."""

    grad_norm: float  # of the whole gradient, before clipping
    lr: float
    skipped: bool
    work: Work  # since the last step, over all ranks


@dataclass(frozen=True)
class Piece:
    """The part of a logical tensor that a rank holds. Example, half of one: Piece("norm.weight", (8,), ((0, 4),), ...)

    Of the ranks that hold the same part, one `speaks` for it."""

    name: str
    shape: tuple[int, ...]  # of the whole
    box: Box
    tensor: Tensor
    speaks: bool


class Engine(Protocol):
    """Collective methods must be called by every rank of the engine in the same order."""

    data_rank: int  # which share of each batch this rank takes
    data_size: int
    step_count: int  # optimizer steps taken so far, skipped ones included

    def forward_backward(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """Add the gradient of `loss_fn` over `rows`, this data rank's share, cut into micro-batches inside.

        `counts` are this rank's (derived from `rows` where None); their sum over data ranks reaches `loss_fn`, so that
        loss = sum / global count under any split. Returns metrics summed over ranks. Rows without a document are left
        out and never reach `loss_fn`; a rank may have no rows at all.

        A loss_fn with the attribute `pointwise = True` is a token_loss(log_probs, entropy, rows, counts), a sum over
        labels, each by itself. It runs inside the Scorer's forward, is given those that count alone, all of them [M]
        (`core.records.labels_of`), and may be called for some of them at a time, or for none. One with
        `needs_entropy = True` gets the entropy too.
        """

    def measure(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """The metrics that `forward_backward` would return, without a gradient: validation."""

    def step(self) -> StepReport:
        """Clip, update, zero the gradients, advance the schedule."""

    def infer(self, rows: Rows) -> Scores:
        """Scores without gradients at prediction positions, for this data rank's rows, in the update's row shapes."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, full tensor) of every parameter, one at a time. Collective."""

    def pieces(self, gradients: bool = False) -> Iterator[Piece]:
        """What this rank holds of every parameter, copies that others speak for included; or of every gradient since
        the last step. Collective. An engine whose gradients cannot be had gives none of them."""

    def fingerprints(self) -> dict[str, int]:
        """The hash of this rank's part of every parameter, by logical name; over ranks they add up modulo 2**64."""

    def digest(self) -> str:
        """16 hex digits that name the bits of all parameters, however they are laid out. Collective."""

    def shards(self) -> Iterator[tuple[str, Box, Tensor]]:
        """This rank's part of parameters ("model/NAME") and optimizer states ("optim/KIND/NAME"), without overlap
        between ranks."""

    def load_shards(self, read: ReadBox) -> None:
        """Fill this rank's part of what `shards` names from `read`."""

    def load_weights(self, read: ReadBox) -> None:
        """Fill parameters alone (names without the "model/" prefix); the optimizer starts afresh."""
