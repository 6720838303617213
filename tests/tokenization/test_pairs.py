"""Pairs by hand, and each against a count that knows nothing of the library."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from framework.core.errors import UsageError
from framework.tokenization.pairs import Symbols, learn_pairs


def test_by_hand() -> None:
    """low 5 times, lower twice, newest 6 times, the example of the paper less its word ends: w-e stands 8 times and is
    merged first; then l-o, 7 times; then, 6 times each, the parts of newest, which becomes one symbol before lower."""
    low, lower, newest = (0, 1, 2), (0, 1, 2, 3, 4), (5, 3, 2, 3, 6, 7)
    assert learn_pairs({low: 5, lower: 2}, 2) == [((0,), (1,)), ((0, 1), (2,))]
    merges = learn_pairs({low: 5, lower: 2, newest: 6}, 100)
    made = [left + right for left, right in merges]
    assert made[:2] == [(2, 3), (0, 1)]
    assert made.index(newest) == 5
    assert made[-2:] == [(0, 1, 2, 3), lower] or made[-1] == lower


def test_a_pair_seen_too_seldom_is_none() -> None:
    assert learn_pairs({(0, 1): 2, (1, 0): 1}, 9) == [((0,), (1,))]
    assert learn_pairs({(0, 1): 2}, 9, min_frequency=3) == []
    assert learn_pairs({}, 9) == learn_pairs({(0, 1): 9}, 0) == []


def test_each_merge_is_of_a_most_frequent_pair() -> None:
    draw = random.Random(0)
    words = Counter(tuple(draw.choices(range(9), k=draw.randint(1, 12))) for _ in range(200))
    split = {word: [(symbol,) for symbol in word] for word in words}
    merges = learn_pairs(words, 40)
    assert len(merges) == 40
    assert merges == learn_pairs(words, 40)
    for merge in merges:
        counts: Counter[tuple[Symbols, Symbols]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        assert counts[merge] == max(counts.values())
        split = {word: merged(parts, merge) for word, parts in split.items()}


def merged(parts: list[Symbols], pair: tuple[Symbols, Symbols]) -> list[Symbols]:
    done: list[Symbols] = []
    just_merged = False
    for part in parts:
        if done and not just_merged and (done[-1], part) == pair:
            done[-1], just_merged = done[-1] + part, True
        else:
            done.append(part)
            just_merged = False
    return done


def test_more_symbols_than_there_are_characters_are_refused() -> None:
    with pytest.raises(UsageError, match="pairs are learned of at most 1,048,576"):
        learn_pairs({(1 << 20, 1): 2}, 1)
