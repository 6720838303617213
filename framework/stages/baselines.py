"""What a stage's figure is held against, computed on the stage's own rows, token for token."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from framework.core.records import ClassBatch, PreferenceBatch, TokenBatch
from framework.core.runtime import heed
from framework.core.signals import StopRequest
from framework.data.loader import Batch, RowSource
from framework.evaluation.baselines import Bigram, Pair, PairClassifier

_AT_ONCE = 256  # rows


def bigram_nats(train: RowSource, valid: RowSource, vocab_size: int, stop: StopRequest) -> float:
    """Total nats of valid's labels under a Kneser–Ney bigram that learned from train's. Collective."""
    bigram = Bigram.fit(_label_pairs(train, stop), vocab_size)
    return bigram.total_nats(_label_pairs(valid, stop))


def pair_accuracy(train: RowSource, valid: RowSource, vocab_size: int, stop: StopRequest) -> float:
    """The share of valid's pairs that length and bigrams of the answers alone get right. Collective."""
    return PairClassifier.fit(list(_answers(train, stop)), vocab_size).accuracy(list(_answers(valid, stop)))


def label_guess(train: RowSource, valid: RowSource, num_classes: int, stop: StopRequest) -> float:
    """What a guess that reads no text gets on valid: the share that has train's commonest class; without classes (0)
    the mean squared error of train's mean. Collective."""
    known, asked = (torch.cat(list(_class_labels(rows, stop))).double() for rows in (train, valid))
    if not num_classes:
        return float((asked - known.mean()).square().mean())
    commonest = known.long().bincount(minlength=num_classes).argmax()
    return float((asked == commonest).double().mean())


def _class_labels(rows: RowSource, stop: StopRequest) -> Iterator[Tensor]:
    for batch in _batches(rows, stop):
        assert isinstance(batch, ClassBatch)
        yield batch.label


def _batches(rows: RowSource, stop: StopRequest) -> Iterator[Batch]:
    """All rows; every rank goes through all of them, and there is a safe point before each batch."""
    for start in range(0, len(rows), _AT_ONCE):
        heed(stop, "while computing the baseline")
        yield rows.rows(np.arange(start, min(start + _AT_ONCE, len(rows))))


def _label_pairs(rows: RowSource, stop: StopRequest) -> Iterator[list[int]]:
    """(token, label) wherever a label counts: exactly what the model is asked."""
    for batch in _batches(rows, stop):
        assert isinstance(batch, TokenBatch)
        pairs = zip(batch.tokens[batch.loss_mask].tolist(), batch.labels[batch.loss_mask].tolist(), strict=True)
        yield from map(list, pairs)


def _answers(rows: RowSource, stop: StopRequest) -> Iterator[Pair]:
    for batch in _batches(rows, stop):
        assert isinstance(batch, PreferenceBatch)
        yield from zip(_labels(batch.chosen), _labels(batch.rejected), strict=True)


def _labels(side: TokenBatch) -> list[list[int]]:
    def row(labels: Tensor, mask: Tensor) -> list[int]:
        ids: list[int] = labels[mask].tolist()
        return ids

    return [row(labels, mask) for labels, mask in zip(side.labels, side.loss_mask, strict=True)]
