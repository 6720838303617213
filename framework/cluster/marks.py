"""Marks on worker methods: how the arguments of a call are shared out over a group's ranks, and how answers are joined.

A worker is a plain class; a mark is an attribute of its method and changes nothing when the method is called directly.
The group reads it. Rows are split by **data rank**: tensor, pipeline and context peers share a data rank, get the same
rows, and the first of them answers. Left out: how a call reaches a rank (`group`, `ray_group`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from framework.core.errors import UsageError, nearest
from framework.core.records import Record

F = TypeVar("F", bound=Callable[..., Any])
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Answer(Enum):
    """How the answers of the ranks become one."""

    ROWS = "rows"  # one after another by data rank
    FIRST = "first"  # rank 0's: all are equal, or already reduced
    LIST = "list"  # all of them, by rank
    STREAM = "stream"  # rank 0's items, one at a time


@dataclass(frozen=True)
class Mark:
    """What a group does with a method. `split`: Record arguments are split by data rank, all others go to all ranks."""

    split: bool
    answer: Answer


def split_rows(method: F) -> F:
    """Records are split, the Tensor or Record that each data rank answers is concatenated in order.

    Rows that do not divide evenly are made up with copies of the last one, whose answers are dropped again: collective
    calls need equal shares. A method that answers k rows for each row it got (k samples a prompt) is welcome.
    """
    return _mark(method, Mark(split=True, answer=Answer.ROWS))


def split_reduced(method: F) -> F:
    """Records are split, and must divide; the answer was reduced over ranks inside, so rank 0's is the one: updates."""
    return _mark(method, Mark(split=True, answer=Answer.FIRST))


def same(method: F) -> F:
    """Every rank gets the same arguments, rank 0 answers."""
    return _mark(method, Mark(split=False, answer=Answer.FIRST))


def every(method: F) -> F:
    """Every rank gets the same arguments; the answer is the list of all answers by rank."""
    return _mark(method, Mark(split=False, answer=Answer.LIST))


def stream(method: F) -> F:
    """A generator method, run on every rank (it may be collective); rank 0's items come one at a time.

    Each is a Pending that may be handed to another group's method: it then travels from worker to worker, and not
    through the caller."""
    return _mark(method, Mark(split=False, answer=Answer.STREAM))


def mark_of(worker_class: type, name: str) -> Mark:
    """The mark of a method; an unknown or unmarked one is an AttributeError that says so."""
    method = getattr(worker_class, name, None)
    marked = [n for n in dir(worker_class) if hasattr(getattr(worker_class, n), "mark")]
    if method is None:
        raise AttributeError(f"{worker_class.__name__} has no method '{name}': {nearest(name, marked)}")
    mark = getattr(method, "mark", None)
    if not isinstance(mark, Mark):
        raise AttributeError(
            f"{worker_class.__name__}.{name} carries no mark, so a group cannot call it; mark it with split_rows, "
            f"split_reduced, same, every or stream, or call one of: {', '.join(marked)}"
        )
    return mark


@dataclass(frozen=True)
class Layout:
    """The data rank of each rank. Example: four ranks, two data ranks of two tensor peers: Layout((0, 0, 1, 1))."""

    data_ranks: tuple[int, ...]

    @property
    def data_size(self) -> int:
        return max(self.data_ranks) + 1

    @property
    def speakers(self) -> tuple[int, ...]:
        """The first rank of each data rank, in the order of data ranks."""
        return tuple(self.data_ranks.index(r) for r in range(self.data_size))


def share_out(mark: Mark, call: Call, layout: Layout) -> tuple[list[Call], int]:
    """What each rank is called with, and the number of rows before any padding (0 where nothing is split)."""
    if not mark.split:
        return [call] * len(layout.data_ranks), 0
    rows = _num_rows(call)
    if mark.answer is not Answer.ROWS and rows % layout.data_size:
        raise UsageError(
            f"{rows} rows cannot be split evenly over {layout.data_size} data ranks; "
            f"batch.size must be a multiple of {layout.data_size}"
        )
    if layout.data_size == 1:
        return [call] * len(layout.data_ranks), rows
    calls = [_take(call, index) for index in _shares(rows, layout.data_size)]
    return [calls[r] for r in layout.data_ranks], rows


def join(mark: Mark, answers: Sequence[Any], layout: Layout, rows: int) -> Any:
    """One answer from those of all ranks; `rows` is what `share_out` said."""
    if mark.answer is Answer.LIST:
        return list(answers)
    if mark.answer is Answer.FIRST:
        return answers[0]
    parts = [answers[rank] for rank in layout.speakers]
    asked = len(_shares(rows, layout.data_size)[0]) * layout.data_size
    joined = _concat(parts)
    kept = slice(rows * (len(joined) // asked))
    return joined[kept] if isinstance(joined, Tensor) else joined.select(kept)


def _mark(method: F, mark: Mark) -> F:
    method.mark = mark  # type: ignore[attr-defined]
    return method


def _num_rows(call: Call) -> int:
    lengths = {len(value) for value in (*call[0], *call[1].values()) if isinstance(value, Record)}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"a call that splits rows needs records of one length above zero, got {sorted(lengths)}")
    return lengths.pop()


def _shares(rows: int, data_size: int) -> list[Tensor]:
    """Row numbers of each data rank: consecutive, equally many, the last row repeated to fill up."""
    size = -(-rows // data_size)
    return list(torch.arange(size * data_size).clamp(max=rows - 1).split(size))


def _take(call: Call, index: Tensor) -> Call:
    def part(value: Any) -> Any:
        return value.select(index) if isinstance(value, Record) else value

    args, kwargs = call
    return tuple(part(value) for value in args), {name: part(value) for name, value in kwargs.items()}


def _concat(parts: list[Any]) -> Any:
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(parts)
    if all(isinstance(part, Record) for part in parts):
        return type(parts[0]).concat(parts)
    raise TypeError(f"a split_rows method must answer a Tensor or a Record, got {type(parts[0]).__name__}")
