"""Several sources as one, drawn in given shares.

The share, rounded to a thousandth, holds at every moment, not only on average: after n rows each source has given its
share of n to within one row of every source, because each position goes to the source that lags most behind. A source
with an epoch cap drops out where it reaches the cap, and the others share what it leaves; so the order never depends on
how long a run is. Left out: weights that change with the loss.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from framework.core.config import digest
from framework.core.errors import UsageError
from framework.core.records import PreferenceBatch
from framework.data.config import DataConfig
from framework.data.loader import Array, Batch, RowSource, epochs

_PERIOD = 1000  # positions after which the pattern of sources repeats: shares are multiples of a thousandth


def open_parts(config: DataConfig, part: str, open_one: Callable[[DataConfig], RowSource]) -> RowSource:
    """One source, or, where the recipe mixes, a mixture of one source a path of data.train."""
    alone = replace(config, weights=[], temperature=0.0, max_epochs=[])
    if config == alone or part != "train":
        return open_one(alone)
    sources = [open_one(replace(alone, train=[path])) for path in config.train]
    shares = config.weights or tempered([len(source) for source in sources], config.temperature or 1.0)
    caps = config.max_epochs * len(sources) if len(config.max_epochs) == 1 else config.max_epochs
    return Mixture(sources, shares, caps)


def tempered(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares in proportion to size^(1/temperature): 1 draws by size, more lifts the small ones, infinity draws all
    alike (Conneau et al. 2020, equation 1, with alpha = 1/temperature). Example: (100, 1), 2 -> [10/11, 1/11]."""
    raised = np.asarray(sizes, float) ** (1 / temperature)
    return [float(share) for share in raised / raised.sum()]


class Mixture:
    """Rows of all sources, numbered one source after another; `order` says in what order they are drawn."""

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float], max_epochs: Sequence[float] = ()):
        """`max_epochs`: how often each source may be gone through, () for any number of times."""
        self.sources = list(sources)
        sizes = np.array([len(source) for source in sources])
        self._ends = np.cumsum(sizes)
        caps = np.floor(sizes * np.asarray(max_epochs)) if max_epochs else np.full(len(sizes), np.inf)
        self._stretches = _stretches(np.asarray(weights, float), caps)
        self.available = self._stretches[-1].stop

    def __len__(self) -> int:
        return int(self._ends[-1])

    def over(self, sources: Sequence[RowSource]) -> Self:
        """The same mixture of other sources, each as long as the one in whose place it stands."""
        other = copy.copy(self)
        other.sources = list(sources)
        return other

    @property
    def fingerprint(self) -> str:
        """Of the rows and their numbers; in what order they are drawn is another matter."""
        return digest([source.fingerprint for source in self.sources])

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
        chosen, nth = np.empty_like(positions), np.empty_like(positions)
        begins = np.array([stretch.start for stretch in self._stretches])
        number = np.searchsorted(begins, positions, side="right") - 1
        for n in np.unique(number).tolist():
            here = number == n
            chosen[here], nth[here] = self._stretches[n].at(positions[here])
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


@dataclass(frozen=True)
class _Stretch:
    """Positions from `start` to `stop` of the stream, in which the same sources are drawn by one repeating pattern."""

    start: int
    stop: float  # infinite where no source ever drops out
    source: Array  # [_PERIOD]: which source each position takes
    nth: Array  # [_PERIOD]: how many rows that source gave before in the period
    counts: Array  # [S]: rows that each source gives in a period
    before: Array  # [S]: rows that each source gave before `start`

    def at(self, positions: Array) -> tuple[Array, Array]:
        """(source, how many rows it gave before) at positions of the stream."""
        block, within = np.divmod(positions - self.start, _PERIOD)
        chosen = self.source[within]
        return chosen, self.before[chosen] + block * self.counts[chosen] + self.nth[within]

    def given(self, stop: int) -> Array:
        """[S]: rows that each source gave before position `stop`."""
        block, rest = divmod(stop - self.start, _PERIOD)
        given: Array = self.before + block * self.counts + np.bincount(self.source[:rest], minlength=len(self.counts))
        return given


def _stretches(weights: Array, caps: Array) -> list[_Stretch]:
    """The whole stream: a stretch ends where a source reaches its cap [S] of rows."""
    found: list[_Stretch] = []
    start, given = 0, np.zeros(len(weights), np.int64)
    while (given < caps).any():
        source, nth = _pattern(np.where(given < caps, weights, 0.0))
        counts = np.bincount(source, minlength=len(weights))
        if not counts[given < caps].all():
            raise UsageError(f"data.weights={weights.tolist()}: the least is below one in {_PERIOD} rows; leave it out")
        stop = start + min(_position(source, s, caps[s] - given[s]) for s in np.flatnonzero(counts).tolist())
        found.append(_Stretch(start, stop, source, nth, counts, given))
        if stop == np.inf:
            break
        start, given = int(stop), found[-1].given(int(stop))
    return found


def _position(source: Array, s: int, number: float) -> float:
    """Where, in the repeating pattern, source `s` would give its row `number`, counted from 0."""
    if number == np.inf:
        return number
    places = np.flatnonzero(source == s)
    block, rest = divmod(int(number), len(places))
    return float(block * _PERIOD + places[rest])


def _pattern(weights: Array) -> tuple[Array, Array]:
    """For each position of a period: which source, and how many rows that source gave before in the period."""
    shares = weights / weights.sum()
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
    batch: Batch = type(parts[0]).concat(parts)
    return batch.select(torch.from_numpy(np.argsort(places)))
