"""What a stage's figure is held against, computed on the stage's own rows, token for token."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from framework.core.records import PreferenceBatch, TokenBatch
from framework.data.loader import Batch, RowSource
from framework.evaluation.baselines import Bigram, Pair, PairClassifier

_AT_ONCE = 256  # rows


def bigram_nats(train: RowSource, valid: RowSource, vocab_size: int) -> float:
    """Total nats of valid's labels under a Kneser–Ney bigram that learned from train's."""
    bigram = Bigram.fit(_label_pairs(train), vocab_size)
    return bigram.total_nats(_label_pairs(valid))


def pair_accuracy(train: RowSource, valid: RowSource, vocab_size: int) -> float:
    """The share of valid's pairs that length and bigrams of the answers alone get right."""
    return PairClassifier.fit(list(_answers(train)), vocab_size).accuracy(list(_answers(valid)))


def _batches(rows: RowSource) -> Iterator[Batch]:
    for start in range(0, len(rows), _AT_ONCE):
        yield rows.rows(np.arange(start, min(start + _AT_ONCE, len(rows))))


def _label_pairs(rows: RowSource) -> Iterator[list[int]]:
    """(token, label) wherever a label counts: exactly what the model is asked."""
    for batch in _batches(rows):
        assert isinstance(batch, TokenBatch)
        pairs = zip(batch.tokens[batch.loss_mask].tolist(), batch.labels[batch.loss_mask].tolist(), strict=True)
        yield from map(list, pairs)


def _answers(rows: RowSource) -> Iterator[Pair]:
    for batch in _batches(rows):
        assert isinstance(batch, PreferenceBatch)
        yield from zip(_labels(batch.chosen), _labels(batch.rejected), strict=True)


def _labels(side: TokenBatch) -> list[list[int]]:
    def row(labels: Tensor, mask: Tensor) -> list[int]:
        ids: list[int] = labels[mask].tolist()
        return ids

    return [row(labels, mask) for labels, mask in zip(side.labels, side.loss_mask, strict=True)]
