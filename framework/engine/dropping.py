"""What an adapter's dropout is told before each micro-batch: the step, and the numbers of the rows (`models.dropout`).

Left out: what is dropped, which is a function of these.
"""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch
from torch import nn

from framework.core.records import PreferenceBatch
from framework.engine.micro_batches import MicroBatch
from framework.models.dropout import Dropout, Moment


class Dropping:
    """Of all dropouts in `modules`; `micro_size` rows (pairs count once) are one micro-batch."""

    def __init__(self, modules: Iterable[nn.Module], micro_size: int, device: torch.device):
        found = (part.moment for module in modules for part in module.modules() if isinstance(part, Dropout))
        self._moments: list[Moment] = list(dict.fromkeys(found))
        self._micro_size, self._device = micro_size, device

    @classmethod
    def of(cls, modules: Iterable[nn.Module], micro_size: int, device: torch.device) -> "Dropping | None":
        """None where nothing drops anything."""
        dropping = cls(modules, micro_size, device)
        return dropping if dropping._moments else None

    def around(self, loss_of: Callable[..., Any], step: int, first: int) -> Callable[..., Any]:
        """`loss_of` of one micro-batch after another, beginning with row `first` of the step's batch over all ranks. A
        pair's sides are two rows. Backward must follow before the next forward."""
        starts = count(first, self._micro_size)

        def told(score: Any, micro: MicroBatch) -> Any:
            rows = torch.arange(self._micro_size, device=self._device) + next(starts)
            if isinstance(micro.rows, PreferenceBatch):
                rows = torch.cat([2 * rows, 2 * rows + 1])
            for moment in self._moments:
                moment.step, moment.rows = torch.tensor(step, device=self._device), rows
            return loss_of(score, micro)

        return told
