"""Rows whose places are shared out: padded to what the layout divides, cut over context ranks, and joined again.

Takes the place of a Scorer's way of taking rows (whole). Tensor ranks share out places too, but only between matrices
(`tensor`): of them rows need to know no more than what their length must be a multiple of.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from framework.core.records import TokenBatch
from framework.parallel.context import Cut
from framework.parallel.movements import sum_over


class CutRows(nn.Module):
    """`multiple`: what a row's length is padded to with empty places."""

    def __init__(self, multiple: int, cutter: Cut):
        super().__init__()
        self.multiple, self.cutter = multiple, cutter
        self.whole = cutter.ranks.size == 1

    def cut(self, inputs: TokenBatch) -> TokenBatch:
        """[B,T] -> [B,t], this rank's places of each row."""
        missing = -inputs.tokens.shape[1] % self.multiple

        def part(x: Tensor) -> Tensor:
            return self.cutter.cut(F.pad(x, (0, missing)))

        return pytree.tree_map_only(Tensor, part, inputs)

    def join(self, x: Tensor, length: int) -> Tensor:
        """x[B,t] of this rank's places -> [B,length] of all."""
        return self.cutter.join(x)[:, :length]

    def last(self, hidden: Tensor, document_ids: Tensor) -> Tensor:
        """The state of each row's last real token: hidden[B,t,D], document_ids[B,t] (0 = padding) -> [B,D]; zeros where
        another rank holds the place."""
        return self.cutter.last(hidden, document_ids)

    def total(self, x: Tensor) -> Tensor:
        """What a head without bias made of `last`, on every rank: x[B,C] summed over the ranks that share rows out. So
        the head learns on the rank that holds the place, and the ranks' gradients add up."""
        return sum_over(x, self.cutter.ranks)
