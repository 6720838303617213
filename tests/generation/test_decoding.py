"""The schedule: slots never idle while rows wait, and the books agree with the board."""

import numpy as np
import pytest
import torch

from framework.generation.config import SamplingConfig
from framework.generation.decoding import Board, Decoding
from tests.generation import tiny

MAX_TOKENS = 10


def new_board(rows: int, width: int = 24) -> Board:
    prompts = tiny.prompts(rows)
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    tokens[:, : prompts.tokens.shape[1]] = prompts.tokens * prompts.token_mask
    lengths = prompts.token_mask.sum(1).numpy()
    return Board(
        tokens=tokens,
        log_probs=torch.zeros(rows, width),
        row=prompts.row,
        sample=torch.zeros(rows, dtype=torch.int64),
        prompt_lengths=lengths,
        lengths=lengths.copy(),
        stopped=np.zeros(rows, dtype=bool),
    )


def decoding(board: Board, slots: int) -> Decoding:
    stop = torch.tensor([tiny.STOP, 9, 11])
    return Decoding(
        tiny.model().requires_grad_(False), board, SamplingConfig(max_tokens=MAX_TOKENS), stop, slots, seed=1
    )


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_a_freed_slot_is_refilled_before_anyone_grows(slots: int) -> None:
    board = new_board(11)
    at_work = decoding(board, slots)
    growths = []
    before = board.lengths.copy()
    for _ in at_work.run():
        growths.append(int((board.lengths - before).sum()))
        before = board.lengths.copy()
    answers = board.lengths - board.prompt_lengths
    assert len(set(answers.tolist())) > 3  # rows end at different times, else nothing is refilled
    assert growths == expected_growths(answers.tolist(), min(slots, 11))


def expected_growths(answers: list[int], slots: int) -> list[int]:
    """How many rows grow in each round, worked out on plain lists: fill every free slot, then one token for all."""
    waiting, busy, growths = list(answers), [], []
    while waiting or busy:
        fresh = [waiting.pop(0) for _ in range(min(slots - len(busy), len(waiting)))]
        if fresh:
            growths.append(len(fresh))
            busy += [left - 1 for left in fresh if left > 1]
        if busy:
            growths.append(len(busy))
            busy = [left - 1 for left in busy if left > 1]
    return growths


def test_a_row_ends_at_a_stop_token_or_at_its_length_and_nothing_is_written_behind() -> None:
    board = new_board(11)
    for _ in decoding(board, 4).run():
        pass
    answers = board.lengths - board.prompt_lengths
    assert ((answers == MAX_TOKENS) | board.stopped).all()
    assert 0 < board.stopped.sum() < 11
    last = board.tokens[torch.arange(11), torch.from_numpy(board.lengths - 1)]
    assert np.array_equal(np.isin(last.numpy(), [tiny.STOP, 9, 11]), board.stopped)
    behind = torch.arange(24) >= torch.from_numpy(board.lengths)[:, None]
    assert not board.tokens[behind].any()
    assert not board.log_probs[behind].any()
