"""Workers that stand in for real ones in the tests of groups: small, and able to fail in every way."""

import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from framework.cluster.marks import every, same, split_reduced, split_rows, stream
from framework.core.errors import DataError, NonFiniteError
from framework.core.records import PromptBatch
from framework.core.runtime import Runtime


def prompts(rows: int, width: int = 3) -> PromptBatch:
    """Row r holds r*width, r*width + 1, ..."""
    tokens = torch.arange(rows * width).reshape(rows, width)
    return PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows))


class StandIn:
    """`peers` consecutive ranks form one data rank, as tensor-parallel peers do."""

    def __init__(self, runtime: Runtime, peers: int = 1, fail_at_start: int = -1):
        self.runtime = runtime
        self.data_rank = runtime.rank // peers
        self.data_size = runtime.world_size // peers
        self.held: list[Tensor] = []
        if runtime.rank == fail_at_start:
            raise ValueError("no such weights")

    @split_rows
    def squares(self, batch: PromptBatch, add: int = 0) -> Tensor:
        return batch.tokens**2 + add

    @split_rows
    def answers(self, batch: PromptBatch, samples: int) -> PromptBatch:
        return batch.select(torch.arange(len(batch)).repeat_interleave(samples))

    @split_rows
    def seen(self, batch: PromptBatch) -> Tensor:
        """Which rank answered each row."""
        return torch.full((len(batch),), self.runtime.rank)

    @split_rows
    def wrong_answer(self, batch: PromptBatch) -> dict[str, int]:
        return {}

    @split_reduced
    def total(self, batch: PromptBatch) -> float:
        """The sum over all rows, each counted once."""
        total = (
            batch.tokens.sum().double() if self.runtime.rank % (self.runtime.world_size // self.data_size) == 0 else 0
        )
        total = torch.as_tensor(total, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total)

    @same
    def echo(self, value: object) -> tuple[int, object]:
        return self.runtime.rank, value

    @every
    def facts(self) -> dict[str, object]:
        return {
            "rank": self.runtime.rank,
            "world": self.runtime.world_size,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    @stream
    def items(self, count: int, fail_after: int = -1, die_after: int = -1) -> Iterator[Tensor]:
        for i in range(count):
            if i == fail_after:
                raise NonFiniteError(f"item {i} is NaN")
            if i == die_after:
                os._exit(1)
            item = torch.full((4,), i, dtype=torch.float32)
            if dist.is_initialized():
                dist.all_reduce(item)
            yield item

    @same
    def hold(self, item: Tensor) -> int:
        self.held.append(item.clone())
        return len(self.held)

    @same
    def sum_held(self) -> float:
        return float(sum(item.sum() for item in self.held))

    @every
    def fail(self, rank: int, how: str) -> None:
        """Rank `rank` fails; its peers wait for it in a collective."""
        if self.runtime.rank == rank:
            print("the last words of this worker")
            sys.stdout.flush()
            _fail(how)
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1))

    def unmarked(self) -> None: ...


def _fail(how: str) -> None:
    if how == "exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), 9)
    elif how == "non_finite":
        raise NonFiniteError("the gradient is NaN")
    elif how == "data":
        raise DataError("no field 'text'", "corpus.jsonl", 7)
    elif how == "ours":
        raise ZeroDivisionError("a fault of our own")
    elif how == "hang":
        time.sleep(600)
