"""What a learned model must beat: a Kneser–Ney bigram for language, a classifier that sees style alone for rewards.

Both work on token ids, so that model and baseline answer for the same tokens. Larger orders and smoothing searches are
left out: the bigram is a yardstick that anyone can work by hand, not a rival.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # (chosen, rejected)


@dataclass(frozen=True)
class Bigram:
    """Interpolated Kneser–Ney (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7) over ids in [0, vocab_size).

    p(b|a) = max(c(ab) − D, 0) / c(a·) + D·N(a·) / c(a·) · q(b), where N(a·) counts the different followers of a, and q
    is the same formula one order lower, over how many different ids precede b, spread at last over the vocabulary:
    q(b) = max(N(·b) − D, 0) / N(··) + D·#{b: N(·b) > 0} / N(··) / vocab_size. An unseen context falls back to q.
    """

    vocab_size: int
    discount: float
    pairs: dict[tuple[int, int], int]  # c(ab)
    contexts: dict[int, int]  # c(a·)
    followers: dict[int, int]  # N(a·)
    preceders: dict[int, int]  # N(·b)

    @classmethod
    def fit(cls, sequences: Iterable[Ids], vocab_size: int, discount: float | None = None) -> "Bigram":
        """Counts of every adjacent pair. `discount` None: n1 / (n1 + 2 n2), of pairs occurring once and twice."""
        pairs: Counter[tuple[int, int]] = Counter()
        for ids in sequences:
            pairs.update(itertools.pairwise(ids))
        contexts, followers, preceders = Counter[int](), Counter[int](), Counter[int]()
        for (a, b), count in pairs.items():
            contexts[a] += count
            followers[a] += 1
            preceders[b] += 1
        discount = _discount(pairs) if discount is None else discount
        return cls(vocab_size, discount, pairs, contexts, followers, preceders)

    def probability(self, a: int, b: int) -> float:
        """p(b|a); sums to one over b."""
        below = self._continuation(b)
        seen = self.contexts.get(a, 0)
        if not seen:
            return below
        kept = max(self.pairs.get((a, b), 0) - self.discount, 0.0)
        return (kept + self.discount * self.followers[a] * below) / seen

    def nats(self, ids: Ids) -> float:
        """−log of the probability of ids[1:] given ids[0], natural logarithm."""
        return -sum(math.log(self.probability(a, b)) for a, b in itertools.pairwise(ids))

    def total_nats(self, sequences: Iterable[Ids]) -> float:
        """The sum of `nats` over held-out sequences."""
        return sum(self.nats(ids) for ids in sequences)

    def _continuation(self, b: int) -> float:
        types = len(self.pairs)
        if not types:
            return 1.0 / self.vocab_size
        kept = max(self.preceders.get(b, 0) - self.discount, 0.0)
        return (kept + self.discount * len(self.preceders) / self.vocab_size) / types


@dataclass(frozen=True)
class PairClassifier:
    """Tells the chosen answer by its length and its bigram probability alone: logistic regression on the differences.

    If it does well, pairs can be told apart without reading the prompt, and a reward model's accuracy means little.
    """

    bigram: Bigram
    weights: np.ndarray  # [2], on the standardised differences
    scale: np.ndarray  # [2]

    @classmethod
    def fit(cls, pairs: Sequence[Pair], vocab_size: int) -> "PairClassifier":
        """The bigram learns from both answers (from the chosen ones alone it would know the training pairs by heart and
        nothing of others), the weights from chosen − rejected."""
        bigram = Bigram.fit((ids for pair in pairs for ids in pair), vocab_size)
        differences = np.array([_features(bigram, pair) for pair in pairs])
        scale = np.sqrt((differences**2).mean(axis=0)) + 1e-12
        return cls(bigram, _logistic(differences / scale), scale)

    def accuracy(self, pairs: Sequence[Pair]) -> float:
        """The share of pairs whose chosen answer scores higher; a tie counts half."""
        differences = np.array([_features(self.bigram, pair) for pair in pairs]) / self.scale
        scores = differences @ self.weights
        return float(((scores > 0) + 0.5 * (scores == 0)).mean())


def _features(bigram: Bigram, pair: Pair) -> tuple[float, float]:
    """(length, log-probability) of chosen less those of rejected."""
    chosen, rejected = pair
    return float(len(chosen) - len(rejected)), bigram.nats(rejected) - bigram.nats(chosen)


def _logistic(differences: np.ndarray, ridge: float = 1e-3, rounds: int = 25) -> np.ndarray:
    """argmin of the mean of log(1 + exp(−w·x)) + ridge/2·|w|² by Newton's method: convex, so a few rounds settle it.
    No intercept: swapping a pair must swap the answer."""
    weights = np.zeros(differences.shape[1])
    for _ in range(rounds):
        wrong = 1.0 / (1.0 + np.exp(np.clip(differences @ weights, -30.0, 30.0)))
        gradient = ridge * weights - (wrong[:, None] * differences).mean(axis=0)
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences / len(differences)
        weights = weights - np.linalg.solve(curvature + ridge * np.eye(len(weights)), gradient)
    return weights


def _discount(pairs: Counter[tuple[int, int]]) -> float:
    once = sum(count == 1 for count in pairs.values())
    twice = sum(count == 2 for count in pairs.values())
    return once / (once + 2 * twice) if once else 0.5
