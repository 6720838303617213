"""Stretches as boxes: every element once and in order, never more boxes than needed."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framework.core.records import Box
from framework.parallel.flat import boxes


def elements(shape: tuple[int, ...], box: Box) -> list[int]:
    """The row-major numbers of a box's elements, in the box's own order."""
    numbers = torch.arange(prod(shape)).reshape(shape)
    return numbers[tuple(slice(offset, offset + length) for offset, length in box)].flatten().tolist()


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_every_element_of_a_stretch_once_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, prod(shape)))
    start = data.draw(st.integers(0, stop))
    found = [number for box in boxes(shape, start, stop) for number in elements(shape, box)]
    assert found == list(range(start, stop))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.data())
def test_no_more_than_two_a_dimension_less_one(shape: tuple[int, ...], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, prod(shape)))
    start = data.draw(st.integers(0, stop))
    assert len(list(boxes(shape, start, stop))) <= 2 * len(shape) - 1


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 2, 2)])
def test_as_few_as_there_can_be(shape: tuple[int, ...]) -> None:
    """Against the best way through all boxes that are one stretch each."""
    sides = [[(o, n) for o in range(size) for n in range(1, size - o + 1)] for size in shape]
    stretches = {}
    for box in itertools.product(*sides):
        numbers = elements(shape, box)
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            stretches[numbers[0], numbers[-1] + 1] = box
    size = prod(shape)
    fewest = {(end, end): 0 for end in range(size + 1)}
    for start, stop in sorted(itertools.combinations(range(size + 1), 2), key=lambda ends: ends[1] - ends[0]):
        cuts = [1 + fewest[end, stop] for begin, end in stretches if begin == start and end <= stop]
        fewest[start, stop] = min(cuts)
    for (start, stop), number in fewest.items():
        assert len(list(boxes(shape, start, stop))) == number, (start, stop)


def test_a_scalar_and_nothing() -> None:
    assert list(boxes((), 0, 1)) == [()]
    assert list(boxes((), 0, 0)) == []
    assert list(boxes((3, 4), 5, 5)) == []
