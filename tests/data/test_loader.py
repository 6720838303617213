"""Law Order: what a rank gets is a pure function of (rows, seed, step), whatever the ranks, batches and restarts."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core import random
from framework.core.errors import UsageError
from framework.core.records import PreferenceBatch, PromptBatch, TokenBatch
from framework.data.loader import Loader


@dataclass
class Numbered:
    """Row r is the token r + 1, everywhere."""

    size: int
    width: int = 3
    skipped: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_bytes: int = 0

    def __len__(self) -> int:
        return self.size

    def rows(self, index: Any) -> Any:
        assert index.dtype == np.int64
        assert (index >= 0).all()
        assert (index < self.size).all()
        tokens = torch.from_numpy(index + 1)[:, None].repeat(1, self.width)
        return TokenBatch(tokens, tokens, tokens > 0, tokens * 0 + torch.arange(self.width), tokens * 0 + 1)

    def preview(self) -> str:
        return ""


class Pairs(Numbered):
    def rows(self, index: Any) -> Any:
        batch = super().rows(index)
        return PreferenceBatch(batch, batch, batch.tokens[:, 0].float())


class Plain(Numbered):
    """Pairs of which nothing more is known: no margin, no reference."""

    def rows(self, index: Any) -> Any:
        batch = super().rows(index)
        return PreferenceBatch(batch, batch)


class Prompts(Numbered):
    def rows(self, index: Any) -> Any:
        tokens = super().rows(index).tokens
        return PromptBatch(tokens, tokens > 0, torch.from_numpy(index))


def drawn(rows: Numbered, size: int, steps: int, data_size: int = 1, seed: int = 7) -> list[int]:
    loaders = [Loader(rows, size, seed, rank, data_size) for rank in range(data_size)]
    return [int(t) - 1 for step in range(steps) for loader in loaders for t in loader.batch(step).tokens[:, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_the_stream_is_independent_of_ranks_batches_and_restarts(
    size: int, data_size: int, share: int, seed: int
) -> None:
    rows, batch = Numbered(size), data_size * share
    whole = drawn(rows, 1, 6 * batch, seed=seed)
    assert drawn(rows, batch, 6, data_size, seed) == whole
    later = Loader(rows, batch, seed, data_size - 1, data_size).batch(4).tokens[:, 0] - 1
    assert later.tolist() == whole[5 * batch - share : 5 * batch]


def test_every_epoch_has_every_row_once_in_a_new_order() -> None:
    stream = drawn(Numbered(10), 4, 10)
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream != drawn(Numbered(10), 4, 10, seed=8)
    assert epochs[1] == random.shuffled(7, "rows:1", 10, np.arange(10)).tolist()


def test_prompts_carry_their_stream_position() -> None:
    batch = Loader(Prompts(3), 4, 0, 1, 2).batch(5)
    assert batch.row.tolist() == [22, 23]


@pytest.mark.parametrize("kind", [Numbered, Pairs, Plain])
@pytest.mark.parametrize(("size", "batch", "data_size"), [(10, 4, 2), (9, 4, 4), (3, 8, 4), (5, 5, 1), (7, 4, 1)])
def test_evaluation_visits_every_row_once_with_equal_shares(
    kind: type[Numbered], size: int, batch: int, data_size: int
) -> None:
    ranks = [list(Loader(kind(size), batch, 0, rank, data_size).evaluation_batches()) for rank in range(data_size)]
    assert len({tuple(len(b) for b in batches) for batches in ranks}) == 1
    rows = [b.inputs() for group in zip(*ranks) for b in group]
    parts = [r.split(len(r) // 2)[0] if kind is not Numbered else r for r in rows]
    found = torch.cat([p.tokens[p.document_ids.any(dim=1)][:, 0] for p in parts]) - 1
    assert found.tolist() == list(range(size))
    empty = [p.select(~p.document_ids.any(dim=1)) for p in parts]
    assert sum(map(len, empty)) < data_size
    assert not any(bool(p.loss_mask.any()) or bool(p.tokens.any()) for p in empty)


def test_evaluation_prompts_are_numbered_in_the_order_of_the_data() -> None:
    batches = list(Loader(Prompts(5), 2, 0).evaluation_batches())
    assert [b.row.tolist() for b in batches] == [[0, 1], [2, 3], [4]]
    assert [b.tokens[:, 0].tolist() for b in batches] == [[1, 2], [3, 4], [5]]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch\.size=5 is not divisible by 2 data ranks"):
        Loader(Numbered(3), 5, 0, 0, 2)
