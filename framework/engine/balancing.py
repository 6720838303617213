"""What the experts of a model are told before backward, and asked after it: their balance (`models.moe`).

Left out: the pull itself, which is part of the layers' forward.
"""

from collections.abc import Sequence

import torch

from framework.core.records import Metrics
from framework.models.transformer import Transformer
from framework.parallel.collectives import Ranks


class Balancing:
    """`models`: the parts of the model on this rank; `stages`: the ranks that share out its layers. `times`: what an
    engine will divide every gradient by."""

    def __init__(self, models: Sequence[Transformer], stages: Ranks, device: torch.device, times: float = 1.0):
        self._balances = [balance for model in models for balance in model.balances()]
        self._stages, self._device, self._times = stages, device, times

    def begin(self, rows: float) -> None:
        """`rows`: how many sequences the optimizer step holds, over all ranks."""
        for balance in self._balances:
            balance.rows, balance.seen = rows / self._times, None

    def figures(self) -> Metrics:
        """The mean over layers and this data rank's rows of sum_e f_e P_e, 1 where all is even. Collective."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for balance in self._balances:
            total = total if balance.seen is None else total + balance.seen
        summed, rows = self._stages.sum(total, "the balance of experts").unbind()
        return {"balance": (summed, rows)}
