"""Continuous batching: rows decode together in slots of the KV cache, and a finished row's slot is refilled at once.

A row's result does not depend on the schedule: slots know nothing of each other, and random numbers belong to the row.
Left out: where weights come from (`native`), and how a token is drawn (`sampling`). The host keeps the books in numpy;
it waits for the device once a step, to learn which rows stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framework.generation.config import SamplingConfig
from framework.generation.sampling import require_finite, sample, sampling_uniforms
from framework.models.config import Architecture
from framework.models.kv_cache import CacheView, KVCache
from framework.models.transformer import Transformer

Integers = np.ndarray  # of int64


@dataclass(frozen=True)
class Board:
    """The rows being written, R answers of at most W tokens: prompts at first, growing to the right.

    Prompt "7 8", after the answer "4 9" with 9 = end of text, W=5:
        tokens [[7, 8, 4, 9, 0]]   log_probs [[0, 0, -1.2, -0.3, 0]]   prompt_lengths [2]   lengths [4]   stopped [True]
    """

    tokens: Tensor  # [R, W] int64, on the model's device
    log_probs: Tensor  # [R, W], on the model's device
    row: Tensor  # [R] int64: the prompt's place in its stream
    sample: Tensor  # [R] int64
    prompt_lengths: Integers  # [R]
    lengths: Integers  # [R] tokens so far
    stopped: np.ndarray  # [R] bool: ended with a stop token

    def __len__(self) -> int:
        return len(self.lengths)


class Decoding:
    """Fills a board. `run` yields whenever rows have grown by a token."""

    def __init__(
        self, model: Transformer, board: Board, sampling: SamplingConfig, stop_ids: Tensor, slots: int, seed: int
    ):
        self.model, self.board, self.sampling, self.stop_ids, self.seed = model, board, sampling, stop_ids, seed
        self.device = board.tokens.device
        self._sees_prompts_whole = model.config.architecture is Architecture.PREFIX
        slots = min(slots, len(board))
        self.cache = KVCache(model.config, slots, board.tokens.shape[1], board.log_probs.dtype, self.device)
        self.uniforms = torch.zeros(slots, sampling.max_tokens, dtype=torch.float64, device=self.device)
        self.row_in = np.full(slots, -1)  # which row of the board a slot holds; -1 = free
        self.next_row = 0

    def run(self) -> Iterator[None]:
        """Until every row is done: refill free slots and read their prompts, then one token for all."""
        while self.next_row < len(self.board) or (self.row_in >= 0).any():
            if self.next_row < len(self.board) and (self.row_in < 0).any():
                self._admit()
                yield
            if (self.row_in >= 0).any():
                self._step()
                yield

    def _admit(self) -> None:
        """The next rows take the free slots: read their prompts, draw their first tokens."""
        board = self.board
        slots = np.flatnonzero(self.row_in < 0)[: len(board) - self.next_row]
        rows = np.arange(self.next_row, self.next_row + len(slots))
        self.next_row += len(slots)
        self.row_in[slots] = rows
        lengths = board.prompt_lengths[rows]
        places = self._on_device(lengths[:, None] + np.arange(self.sampling.max_tokens))
        at = self._on_device(rows)
        self.uniforms[self._on_device(slots)] = sampling_uniforms(
            self.seed, board.row[at][:, None], board.sample[at][:, None], places
        )
        longest = int(lengths.max())
        hidden = self.model(
            board.tokens[at, :longest],
            positions=torch.arange(longest, device=self.device).expand(len(rows), -1),
            prefix_lengths=self._on_device(lengths) if self._sees_prompts_whole else None,
            cache=self._view(slots, longest),
        )
        self._extend(slots, hidden[torch.arange(len(rows), device=self.device), self._on_device(lengths - 1)])

    def _step(self) -> None:
        """Read each busy slot's newest token, draw its next one."""
        slots = np.flatnonzero(self.row_in >= 0)
        rows = self.row_in[slots]
        newest = self.board.lengths[rows] - 1
        positions = self._on_device(newest)[:, None]
        tokens = self.board.tokens[self._on_device(rows)[:, None], positions]
        hidden = self.model(tokens, positions=positions, cache=self._view(slots, int(newest.max()) + 1))
        self._extend(slots, hidden[:, 0])

    def _extend(self, slots: Integers, hidden: Tensor) -> None:
        """Draw a token for each slot from hidden [N, D], write it down, free the slots whose rows are done."""
        board, rows = self.board, self.row_in[slots]
        drawn = board.lengths[rows] - board.prompt_lengths[rows]
        uniforms = self.uniforms[self._on_device(slots), self._on_device(drawn)]
        tokens, log_probs = sample(self.model.logits(hidden), uniforms, self.sampling)
        place = (self._on_device(rows), self._on_device(board.lengths[rows]))
        board.tokens[place] = tokens
        board.log_probs[place] = log_probs
        stopped, lost = torch.stack((torch.isin(tokens, self.stop_ids), torch.isnan(log_probs))).cpu().numpy()
        if lost.any():
            require_finite(log_probs)
        board.lengths[rows] += 1
        board.stopped[rows] = stopped
        self.row_in[slots[stopped | (drawn + 1 == self.sampling.max_tokens)]] = -1

    def _view(self, slots: Integers, used: int) -> CacheView:
        """All slots in order are read in place; a choice of them is gathered."""
        return self.cache.view(None if len(slots) == self.cache.slots else self._on_device(slots), used)

    def _on_device(self, values: Integers) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
