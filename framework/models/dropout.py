"""Dropout (Srivastava et al. 2014) that knows no history: what is dropped is a pure function of (seed, name, optimizer
step, row of the step's batch, place, feature), so that a continued run, a block computed again in backward, and ranks
that share out rows all drop the same.

The engine says which step it is and which rows are coming (`Moment`). Left out: models cut over ranks, whose parts
would have to know their places and features.
"""

import torch
from torch import Tensor, nn

from framework.core import random

_LANES = 8  # numbers of 16 bits in one draw of Philox: neighbouring features share it
_STEPS = 1 << 16  # of the rate


class Moment:
    """Where training stands; all dropouts of a model share one."""

    def __init__(self) -> None:
        self.step = torch.zeros((), dtype=torch.long)
        self.rows = torch.zeros(0, dtype=torch.long)  # [B]: numbers within the step's batch


class Dropout(nn.Module):
    """x with each element zero with probability `rate` (to 2^-16), the others divided by 1 - rate. Only in training."""

    def __init__(self, rate: float, seed: int, name: str, moment: Moment):
        super().__init__()
        self.least = min(round(rate * _STEPS), _STEPS - 1)
        self.key, self.moment = random.key(seed, f"dropout:{name}"), moment

    def forward(self, x: Tensor) -> Tensor:
        """x[B,T,I] -> [B,T,I]."""
        if not self.training:
            return x
        _, length, size = x.shape
        stays = kept(self.key, self.moment.step, self.moment.rows, length, size, self.least)
        return torch.where(stays, x, 0) * (_STEPS / (_STEPS - self.least))


def kept(key: random.Key, step: Tensor, rows: Tensor, length: int, size: int, least: int) -> Tensor:
    """[B,T,I] bool: whether the 16 random bits of an element are at least `least`. step[] and rows[B] int64, below
    2^32. Feature 8 c + 2 w + h has half h, high one first, of word w that Philox gives for (c, place, row, step)."""
    cell = torch.arange(-(-size // _LANES), device=rows.device)
    place = torch.arange(length, device=rows.device).unsqueeze(1)
    words = torch.stack(random.philox(key, (cell, place, rows[:, None, None], step)), dim=-1)
    halves = torch.stack([words >> 16, words & 0xFFFF], dim=-1).to(torch.int32)
    return halves.flatten(2)[..., :size] >= least
