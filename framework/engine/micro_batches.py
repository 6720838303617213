"""Rows cut into forwards of one constant shape, and what comes back put together again.

An empty row has no document: no token of it counts. Empty rows that a loader filled in are dropped at the door, and the
last micro-batch is filled up with fresh ones, so that shapes never change; a loss never sees any of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from framework.core.records import PreferenceBatch, Rows, Scores


@dataclass(frozen=True)
class MicroBatch:
    """`rows` of one forward, of which the first `filled` count; 0 where this rank ran out before others did."""

    rows: Rows
    filled: int


def cut(rows: Rows, size: int, number: int) -> Iterator[MicroBatch]:
    """`number` micro-batches of exactly `size` rows, the last ones filled up with empty rows."""
    for start in range(0, number * size, size):
        part = rows.select(slice(start, start + size))
        yield MicroBatch(fill_up(part, size), len(part))


def fill_up(rows: Rows, size: int) -> Rows:
    """`rows` and empty ones after them, `size` in all."""
    missing = size - len(rows)
    if not missing:
        return rows
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x.new_zeros(missing, *x.shape[1:])]), rows)


def without_empty(rows: Rows) -> Rows:
    """The rows that hold a document. Looks at the rows, so call it before they go to a GPU."""
    side = rows.chosen if isinstance(rows, PreferenceBatch) else rows
    holds = (side.inputs().document_ids > 0).any(dim=1)
    return rows if bool(holds.all()) else rows.select(holds)


def trim(scores: Scores, rows: Rows, count: int) -> Scores:
    """`scores` of `rows` less those of rows from `count` on. Pairs are scored as chosen rows, then rejected ones."""
    return scores if count == len(rows) else _join([_by_row(scores, rows, count)])


def join(parts: list[tuple[Scores, MicroBatch]]) -> Scores:
    """The scores of all filled rows, as one forward over them would have given."""
    return _join([_by_row(scores, micro.rows, micro.filled) for scores, micro in parts])


def _by_row(scores: Scores, rows: Rows, count: int) -> Scores:
    """Leaves [sides x B, ...] -> [count, sides, ...]."""
    shape = (-1, len(rows))
    return pytree.tree_map_only(Tensor, lambda x: x.unflatten(0, shape).transpose(0, 1)[:count], scores)


def _join(parts: list[Scores]) -> Scores:
    return pytree.tree_map_only(Tensor, lambda x: x.transpose(0, 1).flatten(0, 1), Scores.concat(parts))
