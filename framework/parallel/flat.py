"""A stretch of a tensor's elements in row-major order, as boxes: ZeRO cuts flat, checkpoints are made of boxes.

Left out: who holds which stretch (the engine asks DeepSpeed).
"""

from collections.abc import Iterator, Sequence
from math import prod

from framework.core.records import Box, whole


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The fewest boxes that hold the elements [start, stop) of a tensor of `shape`, in order; each is one stretch.

    A stretch of a matrix is at most three: the end of a row, whole rows, the beginning of a row.

    >>> list(boxes((4, 3), 1, 10))
    [((0, 1), (1, 2)), ((1, 2), (0, 3)), ((3, 1), (0, 1))]
    """
    if start >= stop:
        return
    if start == 0 and stop == prod(shape):
        yield whole(shape)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are those from first to last
    if first > last:  # within one row
        yield from _within(shape, last, start, stop)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield ((first, last - first), *whole(shape[1:]))
    if last * row < stop:
        yield from _within(shape, last, last * row, stop)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    """The boxes of [start, stop), which lies in row `index` of the first dimension."""
    row = prod(shape[1:])
    for rest in boxes(shape[1:], start - index * row, stop - index * row):
        yield ((index, 1), *rest)
