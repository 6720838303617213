"""Continuous batching: rows decode together in slots of the KV cache, and a finished row's slot is refilled at once.

A row's result does not depend on the schedule: slots know nothing of each other, and random numbers belong to the row.
Left out: where weights come from (`native`), and how a token is drawn (`sampling`). The host keeps the books in numpy;
it waits for the device once a step, to learn which rows stopped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framework.generation.config import SamplingConfig
from framework.generation.reading import Reader, Source
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
    Where an encoder reads the prompts (`source`), a row begins with the decoder's start token alone.
    """

    tokens: Tensor  # [R, W] int64, on the model's device
    log_probs: Tensor  # [R, W], on the model's device
    row: Tensor  # [R] int64: the prompt's place in its stream
    sample: Tensor  # [R] int64
    prompt_lengths: Integers  # [R]
    lengths: Integers  # [R] tokens so far
    stopped: np.ndarray  # [R] bool: ended with a stop token
    source: Source | None = None

    def __len__(self) -> int:
        return len(self.lengths)


OneToken = Callable[[Transformer, KVCache, Tensor, Tensor], Tensor]


def next_logits(model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [N, V] behind tokens [N, 1] at positions [N, 1], one for every slot of the cache, which keeps them."""
    return model.logits(model(tokens, positions=positions, cache=cache.view())[:, 0])


class Decoding:
    """Fills a board. `run` yields whenever rows have grown by a token."""

    def __init__(
        self,
        model: Transformer,
        board: Board,
        sampling: SamplingConfig,
        stop_ids: Tensor,
        slots: int,
        seed: int,
        one_token: OneToken | None = None,
    ):
        """`one_token`: a compiled `next_logits`. It is called with all slots, busy or not, of a cache whose length is a
        power of two, so that few shapes have to be compiled; so is that of what an encoder reads."""
        self.model, self.board, self.sampling, self.seed = model, board, sampling, seed
        self.stop_ids = stop_ids.cpu().numpy()
        self.device = board.tokens.device
        self._sees_prompts_whole = model.config.architecture is Architecture.PREFIX
        self.one_token = one_token
        width = board.tokens.shape[1]
        if one_token is None:
            slots = min(slots, len(board))
        else:
            width = _power_of_two(width)
        self.reader = None if board.source is None else Reader(model, board.source)
        reads = 0 if board.source is None else board.source.tokens.shape[1]
        reads = _power_of_two(reads) if reads and one_token is not None else reads
        self.cache = KVCache(model.config, slots, width, next(model.parameters()).dtype, self.device, reads)
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

    @torch.inference_mode()
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
        states, real = (None, None) if self.reader is None else self.reader.states(rows)
        hidden = self.model(
            board.tokens[at, :longest],
            positions=torch.arange(longest, device=self.device).expand(len(rows), -1),
            prefix_lengths=self._on_device(lengths) if self._sees_prompts_whole else None,
            encoder_tokens=states,
            encoder_document_ids=real,
            cache=self._view(slots, longest),
        )
        last = hidden[torch.arange(len(rows), device=self.device), self._on_device(lengths - 1)]
        self._extend(slots, self.model.logits(last))

    @torch.inference_mode()
    def _step(self) -> None:
        """Read each busy slot's newest token, draw its next one."""
        slots = np.flatnonzero(self.row_in >= 0)
        rows = self.row_in[slots]
        newest = self.board.lengths[rows] - 1
        positions = self._on_device(newest)[:, None]
        tokens = self.board.tokens[self._on_device(rows)[:, None], positions]
        if self.one_token is None:
            hidden = self.model(tokens, positions=positions, cache=self._view(slots, int(newest.max()) + 1))
            return self._extend(slots, self.model.logits(hidden[:, 0]))
        if len(slots) < self.cache.slots:  # a free slot reads token 0 at place 0, which a prompt overwrites
            at, few, places = self._on_device(slots), tokens, positions
            tokens, positions = (torch.zeros(self.cache.slots, 1, dtype=torch.int64, device=self.device) for _ in "tp")
            tokens[at], positions[at] = few, places
            return self._extend(slots, self.one_token(self.model, self.cache, tokens, positions)[at])
        return self._extend(slots, self.one_token(self.model, self.cache, tokens, positions))

    def _extend(self, slots: Integers, logits: Tensor) -> None:
        """Draw a token for each slot from logits [N, V], write it down, free the slots whose rows are done."""
        board, rows = self.board, self.row_in[slots]
        drawn = board.lengths[rows] - board.prompt_lengths[rows]
        uniforms = self.uniforms[self._on_device(slots), self._on_device(drawn)]
        tokens, log_probs = sample(logits, uniforms, self.sampling, self.model.strict)
        place = (self._on_device(rows), self._on_device(board.lengths[rows]))
        board.tokens[place] = tokens
        board.log_probs[place] = log_probs
        told, certain = torch.stack((tokens.double(), log_probs.double())).cpu().numpy()  # the one wait of a step
        if np.isnan(certain).any():
            require_finite(log_probs)
        stopped = (told[:, None] == self.stop_ids).any(1)
        board.lengths[rows] += 1
        board.stopped[rows] = stopped
        self.row_in[slots[stopped | (drawn + 1 == self.sampling.max_tokens)]] = -1

    def _view(self, slots: Integers, used: int) -> CacheView:
        """All slots in order are read in place; a choice of them is gathered."""
        return self.cache.view(None if len(slots) == self.cache.slots else self._on_device(slots), used)

    def _on_device(self, values: Integers) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def _power_of_two(length: int) -> int:
    """The next one, from 64 on."""
    return max(64, 1 << (length - 1).bit_length())
