"""Variety by hand, and the bootstrap against the textbook's error of a mean."""

import numpy as np
import pytest

from framework.tasks.metrics import bootstrap_error, distinct_n


def test_distinct_n_by_hand() -> None:
    # abab: ab ba ab; abc: ab bc -> 3 different of 5.
    assert distinct_n(["abab", "abc"], 2) == pytest.approx(3 / 5)
    assert distinct_n(["abab", "abc"], 1) == pytest.approx(3 / 7)
    assert distinct_n(["a", ""], 2) == 0.0


def test_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, 3, 400).tolist()
    expected = np.std(values, ddof=1) / np.sqrt(len(values))
    assert bootstrap_error(values, lambda v: float(np.mean(v)), rounds=2000) == pytest.approx(expected, rel=0.1)


def test_bootstrap_repeats_and_is_zero_where_nothing_varies() -> None:
    texts = ["abcd", "abxy", "zzzz", "mnop"]
    assert bootstrap_error(texts, distinct_n, seed=3) == bootstrap_error(texts, distinct_n, seed=3) > 0
    assert bootstrap_error([2.0] * 9, lambda v: float(np.mean(v))) == 0.0
