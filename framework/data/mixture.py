"""Several sources as one, drawn in given shares.

The share holds at every moment, not only on average: after n rows each source has given its share of n to within one
row of every source, because each position goes to the source that lags most behind. Left out: weights that change.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from framework.core.errors import UsageError
from framework.core.records import PreferenceBatch, PromptBatch, TokenBatch
from framework.data.config import DataConfig
from framework.data.loader import Array, Batch, RowSource, epochs

_PERIOD = 1000  # positions after which the pattern of sources repeats: shares are multiples of a thousandth


def open_parts(config: DataConfig, part: str, open_one: Callable[[DataConfig], RowSource]) -> RowSource:
    """One source, or with data.weights a mixture of one source a path of data.train."""
    if not config.weights or part != "train":
        return open_one(replace(config, weights=[]))
    sources = [open_one(replace(config, train=[path], weights=[])) for path in config.train]
    return Mixture(sources, config.weights)


class Mixture:
    """Rows of all sources, numbered one source after another; `order` says in what order they are drawn."""

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self._source, self._nth = _pattern(weights)
        self._counts = np.bincount(self._source, minlength=len(sources))
        if not self._counts.all():
            raise UsageError(f"data.weights={list(weights)}: the least is below one in {_PERIOD} rows; leave it out")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def skipped(self) -> dict[str, int]:
        """Over all sources, by reason."""
        reasons = {reason for source in self.sources for reason in source.skipped}
        return {reason: sum(source.skipped.get(reason, 0) for source in self.sources) for reason in sorted(reasons)}

    @property
    def num_tokens(self) -> int:
        """Over all sources, each once."""
        return sum(source.num_tokens for source in self.sources)

    @property
    def num_bytes(self) -> int:
        """Over all sources, each once."""
        return sum(source.num_bytes for source in self.sources)

    def preview(self) -> str:
        """A sample of the first source."""
        return self.sources[0].preview()

    def order(self, seed: int, positions: Array) -> Array:
        """Row numbers at positions of the stream; each source goes through its own epochs at its own pace."""
        block, within = np.divmod(positions, _PERIOD)
        chosen = self._source[within]
        nth = block * self._counts[chosen] + self._nth[within]
        numbers = np.empty_like(positions)
        for s, source in enumerate(self.sources):
            mine = chosen == s
            numbers[mine] = self._starts(s) + epochs(seed, f"rows:{s}", len(source), nth[mine])
        return numbers

    def rows(self, index: Array) -> Any:
        """The rows of several sources in the order asked for."""
        chosen = np.searchsorted(self._ends, index, side="right")
        parts: list[Any] = []
        places: list[Array] = []
        for s in np.unique(chosen).tolist():
            places.append(np.flatnonzero(chosen == s))
            parts.append(self.sources[s].rows(index[places[-1]] - self._starts(s)))
        return _gathered(parts, np.concatenate(places))

    def _starts(self, source: int) -> int:
        return int(self._ends[source]) - len(self.sources[source])


def _pattern(weights: Sequence[float]) -> tuple[Array, Array]:
    """For each position of a period: which source, and how many rows that source gave before in the period."""
    shares = np.asarray(weights, float) / sum(weights)
    taken = np.zeros(len(shares), np.int64)
    source, nth = np.empty(_PERIOD, np.int64), np.empty(_PERIOD, np.int64)
    for position in range(_PERIOD):
        s = int(np.argmax(shares * (position + 1) - taken))
        source[position], nth[position] = s, taken[s]
        taken[s] += 1
    return source, nth


def _gathered(parts: list[Any], places: Array) -> Batch:
    """One batch from parts; row n of the parts, one after another, belongs at places[n]."""
    if isinstance(parts[0], PreferenceBatch) and any(part.margin is not None for part in parts):
        parts = [replace(p, margin=torch.zeros(len(p))) if p.margin is None else p for p in parts]
    batch: TokenBatch | PreferenceBatch | PromptBatch = type(parts[0]).concat(parts)
    return batch.select(torch.from_numpy(np.argsort(places)))
