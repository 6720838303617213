"""What an encoder makes of prompts, for a decoder that answers them: each is read once, however many rows answer it.

Left out: how the rows are written (`decoding`), and where their slots keep what was read (`models.kv_cache`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framework.models.transformer import Transformer


@dataclass(frozen=True)
class Source:
    """Prompts beside the rows that answer them, those of one prompt one behind another.

    Example, two prompts of two samples each: Source(tokens[2,S], lengths [S, 3], samples=2) for four rows.
    """

    tokens: Tensor  # [P, S] int64, padded on the right, on the model's device
    lengths: Tensor  # [P] int64
    samples: int


class Reader:
    """Rows come in order, a few at a time; of the prompts read only the last can be asked for once more."""

    def __init__(self, model: Transformer, source: Source):
        self.model, self.source = model, source
        self._last: tuple[int, Tensor] | None = None  # (prompt, its states [1, S, D])

    def states(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(states[N,S,D], real[N,S] int64) of the prompts that the rows, ascending numbers, answer."""
        prompts, which = np.unique(rows // self.source.samples, return_inverse=True)
        known = [] if self._last is None or self._last[0] != prompts[0] else [self._last[1]]
        fresh = prompts[len(known) :]
        if len(fresh):
            at = torch.from_numpy(fresh).to(self.source.tokens.device)
            known.append(self.model.encode(self.source.tokens[at], self._real(at)))
        states = torch.cat(known)
        self._last = (int(prompts[-1]), states[-1:])
        at = torch.from_numpy(prompts).to(states.device)
        each = torch.from_numpy(which).to(states.device)
        return states[each], self._real(at)[each]

    def _real(self, prompts: Tensor) -> Tensor:
        places = torch.arange(self.source.tokens.shape[1], device=prompts.device)
        return (places < self.source.lengths[prompts].unsqueeze(1)).long()
