"""Which rows a data rank gets at a step: a pure function of (rows, seed, step), with no state to save (law Order).

Left out: prefetching. A row is a few copies out of mapped memory, far less than the step that consumes it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from framework.core import random
from framework.core.errors import UsageError
from framework.core.records import ClassBatch, PreferenceBatch, PromptBatch, TokenBatch

Array = npt.NDArray[Any]
Batch = TokenBatch | PreferenceBatch | ClassBatch | PromptBatch


class RowSource(Protocol):
    """Rows by number, all of one width."""

    def __len__(self) -> int: ...
    def rows(self, index: Array) -> Batch: ...  # index [B] int64 in range(len)
    def preview(self) -> str: ...  # one decoded sample, trained tokens marked
    @property
    def fingerprint(self) -> str: ...  # equal for equal rows under equal numbers
    @property
    def skipped(self) -> dict[str, int]: ...  # samples left out, by reason
    @property
    def num_tokens(self) -> int: ...  # labels that count
    @property
    def num_bytes(self) -> int: ...  # UTF-8 bytes of the text that they stand for


@runtime_checkable
class Ordered(Protocol):
    """A row source with an order of its own, such as a mixture."""

    available: float  # rows of the stream; infinite where it never ends

    def order(self, seed: int, positions: Array) -> Array: ...  # row numbers at positions of the endless stream


class Loader:
    """This data rank's part of every batch."""

    def __init__(
        self,
        rows: RowSource,
        batch_size: int,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        shape: Callable[[Any, Array], Any] | None = None,
    ):
        """`batch_size` rows over all data ranks; rank d takes the d-th of `data_size` equal, consecutive parts. `shape`
        makes of some rows and their places in the stream what is trained on (an objective that hides tokens)."""
        if batch_size % data_size:
            raise UsageError(f"batch.size={batch_size} is not divisible by {data_size} data ranks")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.data_rank, self.data_size = data_rank, data_size
        self._shape = shape or _number

    def require(self, steps: int) -> None:
        """Refuse a run of `steps` batches for which the stream is too short."""
        needed, there = steps * self.batch_size, self.rows.available if isinstance(self.rows, Ordered) else np.inf
        if needed > there:
            raise UsageError(
                f"the run takes {needed:,} rows and data.max_epochs allows {there:,.0f}; "
                f"shorten it to {int(there) // self.batch_size:,} steps, raise data.max_epochs, or bring more data"
            )

    def batch(self, step: int) -> Any:
        """Rows step * batch_size ... of the endless stream, this rank's part. Prompts carry their stream position."""
        share = self.batch_size // self.data_size
        positions = step * self.batch_size + self.data_rank * share + np.arange(share)
        return self._shape(self.rows.rows(stream(self.rows, self.seed, positions)), positions)

    def evaluation_batches(self) -> Iterator[Any]:
        """Every row once, in the order of the data. All ranks get equally many batches of equal sizes; where the last
        ones do not divide, up to data_size - 1 empty rows (no document, nothing counts) fill in."""
        for start in range(0, len(self.rows), self.batch_size):
            count = min(self.batch_size, len(self.rows) - start)
            share = -(-count // self.data_size)
            positions = start + self.data_rank * share + np.arange(share)
            present = positions < start + count
            batch = self.rows.rows(np.where(present, positions, 0))
            yield self._shape(batch if present.all() else _empty_where(batch, ~present), positions)


def stream(rows: RowSource, seed: int, positions: Array) -> Array:
    """Row numbers at `positions` of the endless stream: all rows once an epoch, in a new order each time."""
    return rows.order(seed, positions) if isinstance(rows, Ordered) else epochs(seed, "rows", len(rows), positions)


def epochs(seed: int, name: str, size: int, positions: Array) -> Array:
    """Entries [B] of the stream that goes through range(size) once an epoch, reshuffled each time."""
    epoch, within = np.divmod(positions, size)
    numbers = np.empty_like(within)
    for e in np.unique(epoch).tolist():
        numbers[epoch == e] = random.shuffled(seed, f"{name}:{e}", size, within[epoch == e])
    return numbers


def _number(batch: Batch, positions: Array) -> Batch:
    if not isinstance(batch, PromptBatch):
        return batch
    return dataclasses.replace(batch, row=torch.from_numpy(positions))


def _empty_where(batch: Batch, empty: Array) -> Batch:
    """`batch` with the rows where `empty` [B] set to zero: no document, no label."""
    rows = torch.from_numpy(empty)

    def clear(leaf: torch.Tensor) -> torch.Tensor:
        return torch.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), torch.zeros_like(leaf), leaf)

    cleared: Batch = pytree.tree_map_only(torch.Tensor, clear, batch)  # a None is a leaf too
    return cleared
