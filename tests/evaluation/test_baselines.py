"""The yardsticks are right: the bigram by hand and by sum, the pair classifier where it can and where it cannot win."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.evaluation.baselines import Bigram, PairClassifier

A, B, C = 0, 1, 2


def test_bigram_equals_a_hand_worked_example() -> None:
    # "abac": pairs ab, ba, ac once each; c(a·)=2, N(a·)=2; every id is preceded by one id: N(·x)=1, N(··)=3.
    bigram = Bigram.fit([[A, B, A, C]], vocab_size=4, discount=0.5)
    below = 0.5 / 3 + 0.5 * 3 / 3 / 4  # q(b) = 7/24, and q of the never seen id = 3/24
    assert below == pytest.approx(7 / 24)
    assert bigram.probability(A, B) == pytest.approx(0.5 / 2 + 0.5 * 2 / 2 * 7 / 24)
    assert bigram.probability(A, 3) == pytest.approx(0.5 * 2 / 2 * 3 / 24)
    assert bigram.probability(C, A) == pytest.approx(7 / 24), "c was never followed by anything"
    assert bigram.nats([A, B, A]) == pytest.approx(-math.log(19 / 48) - math.log(0.5 + 0.5 * 7 / 24))


def test_the_discount_comes_from_singletons_and_doubletons() -> None:
    # ab three times, bc twice, ca once: n1 = 1, n2 = 1, so D = 1 / (1 + 2) = 1/3.
    assert Bigram.fit([[A, B], [A, B, C], [A, B, C, A]], vocab_size=3).discount == pytest.approx(1 / 3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=6), st.integers(0, 6))
def test_probabilities_sum_to_one_in_every_context(sequences: list[list[int]], context: int) -> None:
    bigram = Bigram.fit(sequences, vocab_size=7)
    assert sum(bigram.probability(context, b) for b in range(7)) == pytest.approx(1.0)


def test_total_is_the_sum_over_sequences() -> None:
    bigram = Bigram.fit([[A, B, C], [B, C]], vocab_size=3)
    assert bigram.total_nats([[A, B], [B, C, A]]) == pytest.approx(bigram.nats([A, B]) + bigram.nats([B, C, A]))


def test_a_text_of_its_own_kind_costs_less_than_noise() -> None:
    rng = np.random.default_rng(0)
    regular = [[i % 10 for i in range(start, start + 12)] for start in range(10)]
    bigram = Bigram.fit(regular, vocab_size=10)
    assert bigram.total_nats(regular) < 0.2 * bigram.total_nats([rng.integers(0, 10, 12).tolist() for _ in range(10)])


def test_the_classifier_finds_length_and_wording() -> None:
    rng = np.random.default_rng(0)

    def longer() -> tuple[list[int], list[int]]:
        return rng.integers(0, 9, 8).tolist(), rng.integers(0, 9, 5).tolist()

    def worded() -> tuple[list[int], list[int]]:
        start = int(rng.integers(0, 9))
        return [(start + i) % 9 for i in range(6)], rng.integers(0, 9, 6).tolist()

    for make in (longer, worded):
        classifier = PairClassifier.fit([make() for _ in range(200)], vocab_size=9)
        assert classifier.accuracy([make() for _ in range(200)]) > 0.95


def test_the_classifier_is_blind_to_what_only_the_prompt_tells() -> None:
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 9, 6).tolist() for _ in range(800)]
    pairs = list(zip(answers[::2], answers[1::2]))
    assert 0.4 < PairClassifier.fit(pairs[:200], vocab_size=9).accuracy(pairs[200:]) < 0.6


def test_mirrored_pairs_are_exactly_even() -> None:
    pairs = [([1, 2, 3], [4, 5]), ([4, 5], [1, 2, 3]), ([6, 6], [6, 6])]
    assert PairClassifier.fit(pairs, vocab_size=7).accuracy(pairs) == 0.5
