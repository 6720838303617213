"""Documents into rows of T positions: which go together, and how a row reads.

A plan is made once, over lengths alone, and stored with the shards; from then on a row is a pure function of its
number (law Order). Attention must stay within equal document ids (law Packing). Left out: files (`shards`, `prepare`).
"""

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from framework.core.records import TokenBatch

Array = npt.NDArray[Any]
_WINDOW = 1 << 16


@dataclass(frozen=True)
class Plan:
    """Row r holds items[offsets[r] : offsets[r + 1]]. Example, lengths 3, 2, 4 in rows of 5: offsets [0, 2, 3],
    items [0, 1, 2]."""

    offsets: Array  # [R + 1] int64
    items: Array  # [N] int64


def cut(lengths: Array, capacity: int) -> tuple[Array, Array]:
    """Cut texts longer than a row into consecutive pieces; each position falls in exactly one.

    lengths: [N] positions of each text. Returns (text [M], start within it [M]); a piece has at most `capacity`
    positions. Example, lengths 3 and 12, capacity 5: texts [0, 1, 1, 1], starts [0, 0, 5, 10].
    """
    counts = -(-lengths // capacity)
    texts = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    return texts, (np.arange(len(texts)) - first[texts]) * capacity


def best_fit(lengths: Array, capacity: int, window: int = _WINDOW) -> Plan:
    """Best-fit decreasing within windows of `window` items: each goes where it leaves the least room.

    lengths: [N] in 1..capacity. Deterministic; ties go to the earlier item and the earlier row. Items of a row stand in
    the order of the data.
    """
    counts, items = [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(lengths), window):
        rows = _fill(lengths[start : start + window], capacity)
        counts.append(np.array([len(row) for row in rows]))
        items.append(np.array([start + item for row in rows for item in sorted(row)]))
    return Plan(np.cumsum(np.concatenate(counts)), np.concatenate(items))


def one_each(count: int) -> Plan:
    """Every item in a row of its own."""
    return Plan(np.arange(count + 1, dtype=np.int64), np.arange(count, dtype=np.int64))


def assemble(plan: Plan, index: Array, capacity: int, item: Callable[[int], tuple[Array, Array]]) -> TokenBatch:
    """Rows `index` of a plan as a TokenBatch [B, capacity].

    item(i): (ids, mask) of item i, one longer than its positions: position t reads ids[t] and predicts ids[t + 1], and
    mask[t + 1] says whether that counts.
    """
    shape = (len(index), capacity)
    tokens, labels, positions, documents = (np.zeros(shape, np.int64) for _ in range(4))
    loss_mask = np.zeros(shape, bool)
    for b, row in enumerate(index):
        column = 0
        for number, i in enumerate(plan.items[plan.offsets[row] : plan.offsets[row + 1]], start=1):
            ids, mask = item(int(i))
            place = (b, slice(column, column + len(ids) - 1))
            tokens[place], labels[place], loss_mask[place] = ids[:-1], ids[1:], mask[1:]
            positions[place], documents[place] = np.arange(len(ids) - 1), number
            column += len(ids) - 1
    read = torch.from_numpy
    return TokenBatch(read(tokens), read(labels), read(loss_mask), read(positions), read(documents))


def _fill(lengths: Array, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_room: dict[int, deque[int]] = {}  # rows by the room left in them
    rooms: list[int] = []  # the keys of by_room that have rows, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].popleft()
            if not by_room[room]:
                del rooms[at]
        rows[row].append(item)
        left = room - length
        if left:
            waiting = by_room.setdefault(left, deque())
            if not waiting:
                bisect.insort(rooms, left)
            waiting.append(row)
    return rows
