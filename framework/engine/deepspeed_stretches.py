"""Which stretch of every parameter DeepSpeed keeps on this rank: the master, and where its moments are.

The one page that knows how DeepSpeed (0.19) lays things out. ZeRO-1 and -2 flatten all parameters of a group and cut
that in equal parts; ZeRO-3 cuts every parameter by itself. Left out: what is done with a stretch (`deepspeed_engine`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.core.records import Box
from framework.parallel.collectives import Ranks
from framework.parallel.flat import boxes


@dataclass(frozen=True)
class Stretch:
    """The elements of one parameter from `start` on, in row-major order, that this rank speaks for; maybe none.

    `master` [n] is live. `flat` is what the optimizer updates, None without one; `master` stands in it at `offset`.
    """

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    master: Tensor
    flat: Tensor | None
    offset: int = 0

    def parts(self, values: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The boxes of this stretch, and what of `values` [n] stands in each, sharing memory."""
        done = 0
        for box in boxes(self.shape, self.start, self.start + len(values)):
            lengths = torch.Size([length for _, length in box])
            part = values[done : done + lengths.numel()]
            done += len(part)
            yield box, part.view(lengths)

    def of(self, state: Tensor) -> Tensor:
        """[n]: this stretch of a state that has the shape of `flat`, sharing memory."""
        return state[self.offset : self.offset + len(self.master)]


class Partitions:
    """ZeRO-1 and -2: the compute copy is whole on every rank. Of what does not learn there is nothing else, and the
    first rank speaks for it."""

    def __init__(self, optimizer: Any, ranks: Ranks):
        self._optimizer, self._ranks = optimizer, ranks
        self._still: list[Tensor] = []

    def find(self, name: str, parameter: nn.Parameter) -> Stretch:
        """This rank's stretch of `parameter`."""
        if not parameter.requires_grad:
            self._still.append(parameter.detach())
            whole = parameter.detach().flatten()
            return Stretch(name, parameter.shape, 0, whole if self._ranks.rank == 0 else whole[:0], None)
        link = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's; None where all of it is elsewhere
        if link is None:
            return Stretch(name, parameter.shape, 0, torch.empty(0, device=parameter.device), None)
        (flat,) = self._optimizer.optimizer.param_groups[link.param_group_index]["params"]
        start, offset = link.lp_fragment_address.start, link.hp_fragment_address.start
        return Stretch(name, parameter.shape, start, link.hp_fragment.detach(), flat, offset)

    def forget(self) -> None:
        """Nothing is gathered but for a step."""

    def spread(self) -> None:
        """Give every compute copy what the masters hold. Collective."""
        self._optimizer.update_lp_params()
        for still in self._still:
            if self._ranks.group is not None:
                dist.broadcast(still, group=self._ranks.group, group_src=0)


class Shares:
    """ZeRO-3: equal shares of every parameter, the last ones padded. `optimizer` is DeepSpeed's, or, without an
    optimizer, what gathers and releases parameters."""

    def __init__(self, optimizer: Any, rank: int, trains: bool):
        self._optimizer, self._rank, self._trains = optimizer, rank, trains
        self._gatherer = optimizer.parameter_offload if trains else optimizer

    def find(self, name: str, parameter: Any) -> Stretch:
        """This rank's stretch of `parameter`; where it does not learn the compute copy is the master."""
        share = parameter.partition_numel()
        start = min(self._rank * share, parameter.ds_numel)
        count = min(share, parameter.ds_numel - start)
        if not (self._trains and parameter.requires_grad):
            return Stretch(name, parameter.ds_shape, start, parameter.ds_tensor.detach()[:count], None)
        group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        return Stretch(name, parameter.ds_shape, start, flat.detach()[offset : offset + count], flat, offset)

    def forget(self) -> None:
        """Release what forwards have left gathered: whoever then changes masters would have the old ones."""
        self._gatherer.partition_all_parameters()

    @torch.no_grad()
    def spread(self) -> None:
        """Give every share of the compute copy what the master holds, and gather the small ones that stay whole on
        every rank. Collective."""
        if self._trains:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._gatherer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
