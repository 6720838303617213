"""Measures of a set of answers that no single answer has: variety, and how far a figure may be chance."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different character n-grams over all character n-grams of the texts, in [0, 1]; 0 where there are none
    (Li et al. 2016, with characters for words). It falls with the number of texts: compare equal numbers only."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def bootstrap_error(
    values: Sequence[T], statistic: Callable[[Sequence[T]], float], rounds: int = 200, seed: int = 0
) -> float:
    """The standard error of statistic(values): its standard deviation over `rounds` resamples with replacement
    (Efron 1979). The same values and seed give the same error."""
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(values), (rounds, len(values)))
    return float(np.std([statistic([values[i] for i in pick]) for pick in picks], ddof=1))
