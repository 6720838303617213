"""The plan against a naive best fit and by properties; a row against the worked example of TokenBatch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.packing import Plan, assemble, best_fit, cut, one_each

LENGTHS = st.integers(1, 12).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), max_size=40)))


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan.items[a:b].tolist() for a, b in zip(plan.offsets[:-1], plan.offsets[1:])]


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest row that still has room, a row longest at that level first."""
    rows: list[list[int]] = []
    since: list[int] = []  # when a row last changed
    for time, item in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        left = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [r for r in range(len(rows)) if left[r] >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda r: (left[r], since[r]))
            rows[best].append(item)
            since[best] = time
        else:
            rows.append([item])
            since.append(time)
    return [sorted(row) for row in rows]


def test_a_plan_by_hand() -> None:
    plan = best_fit(np.array([3, 2, 4, 1, 5]), 5)
    assert rows_of(plan) == [[4], [2, 3], [0, 1]]
    assert rows_of(best_fit(np.array([3, 2, 4, 1]), 5, window=2)) == [[0, 1], [2, 3]]
    assert rows_of(one_each(3)) == [[0], [1], [2]]
    assert rows_of(best_fit(np.empty(0, np.int64), 5)) == []


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_the_plan_is_best_fit(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert rows_of(best_fit(np.array(lengths, np.int64), capacity)) == naive_best_fit(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_every_item_once_and_no_row_too_full(case: tuple[int, list[int]], window: int) -> None:
    capacity, lengths = case
    rows = rows_of(best_fit(np.array(lengths, np.int64), capacity, window))
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= capacity for row in rows)


def test_natural_lengths_leave_little_empty() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(3.5, 1.0, 20_000).astype(np.int64) + 1, 512)
    rows = len(best_fit(lengths, 512).offsets) - 1
    assert lengths.sum() / (rows * 512) > 0.99


def test_cutting_by_hand() -> None:
    texts, starts = cut(np.array([3, 12, 5]), 5)
    assert (texts.tolist(), starts.tolist()) == ([0, 1, 1, 1, 2], [0, 0, 5, 10, 0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=10), st.integers(1, 8))
def test_cutting_covers_every_position_once(lengths: list[int], capacity: int) -> None:
    texts, starts = cut(np.array(lengths, np.int64), capacity)
    covered = [
        (text, position)
        for text, start in zip(texts.tolist(), starts.tolist())
        for position in range(start, min(start + capacity, lengths[text]))
    ]
    assert covered == [(text, position) for text, length in enumerate(lengths) for position in range(length)]


def test_a_row_is_the_worked_example() -> None:
    """core.records.TokenBatch: documents "a b c" and "d e", 9 = end."""
    documents = [np.array([1, 2, 3, 9]), np.array([4, 5, 9])]
    plan = Plan(np.array([0, 2]), np.array([0, 1]))
    batch = assemble(plan, np.array([0]), 6, lambda i: (documents[i], np.ones(len(documents[i]), bool)))
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert batch.labels.tolist() == [[2, 3, 9, 5, 9, 0]]
    assert batch.loss_mask.int().tolist() == [[1, 1, 1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2, 0]]


def test_the_mask_is_that_of_the_label() -> None:
    ids, mask = np.array([5, 6, 7, 9]), np.array([False, False, True, True])
    batch = assemble(one_each(1), np.array([0, 0]), 4, lambda _: (ids, mask))
    assert batch.labels.tolist() == [[6, 7, 9, 0]] * 2
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0]] * 2
