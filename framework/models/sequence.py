"""How a Scorer takes its rows: whole, which is this page, or places shared out over ranks, which a plan puts here."""

import torch
from torch import Tensor, nn

from framework.core.records import TokenBatch


class WholeRows(nn.Module):
    """Rows as they are. What takes its place cuts rows into this rank's places and joins what was said of them."""

    whole = True

    def cut(self, inputs: TokenBatch) -> TokenBatch:
        """[B,T] -> [B,t], this rank's places of each row."""
        return inputs

    def join(self, x: Tensor, length: int) -> Tensor:
        """x[B,t] of this rank's places -> [B,length] of all."""
        return x

    def last(self, hidden: Tensor, document_ids: Tensor) -> Tensor:
        """The state of each row's last real token: hidden[B,t,D], document_ids[B,t] (0 = padding) -> [B,D]; zeros where
        another rank holds the place."""
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(document_ids > 0, places, 0).amax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def total(self, x: Tensor) -> Tensor:
        """What a head without bias made of `last`, on every rank: x[B,C] summed over the ranks that share rows out."""
        return x
