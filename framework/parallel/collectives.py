"""Sums, gathers, exchanges and ring hops over ranks, each named, so that a rank that waits in vain can say where it
stands (law Deadline).

Left out: the time limit and the error (`core.deadline`), and FSDP's own collectives; they run inside a `deadline` that
names the phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from framework.core.deadline import deadline

DATA = ("data_replicate", "data_shard")  # the axes of the mesh that cut a batch


@dataclass(frozen=True)
class Arrival:
    """A tensor on its way here from another rank. Example: Arrival("the hop of keys", works, sent, came)."""

    phase: str
    works: list[dist.Work]
    sent: Tensor  # held here until the transfer is over: nobody may reuse its memory before
    came: Tensor

    def wait(self) -> Tensor:
        """The tensor that came, once it is here and what was sent is gone."""
        with deadline(self.phase):
            for work in self.works:
                work.wait()
        return self.came


class Ranks:
    """The ranks along some axes of the mesh. Without a mesh, or with one rank there: every sum is a process's own."""

    def __init__(self, mesh: DeviceMesh | None, axes: tuple[str, ...] = DATA):
        line = None
        if mesh is not None:
            line = mesh[axes[0]] if len(axes) == 1 else mesh[axes]._flatten("_".join(axes))
        self.size = 1 if line is None else line.size()
        self.rank = 0 if line is None else line.get_local_rank()
        self.group = None if line is None or self.size == 1 else line.get_group()

    @classmethod
    def among(cls, members: Sequence[Sequence[int]]) -> "Ranks":
        """The one of `members`, lists of ranks of the world, that this rank is in; alone where it is in none.
        Collective over the world."""
        mine = cls(None)
        for ranks in members:
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                mine.group, mine.size, mine.rank = group, len(ranks), list(ranks).index(dist.get_rank())
        return mine

    def sum(self, x: Tensor, what: str) -> Tensor:
        """The sum of every rank's `x` [...], the same bits on all of them. `what` names it in errors."""
        if self.group is None:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        with deadline(f"the sum of {what}"):
            dist.all_reduce(total, group=self.group)
        return total

    def largest(self, x: Tensor, what: str) -> Tensor:
        """The elementwise largest of every rank's `x` [...]."""
        if self.group is None:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        with deadline(f"the largest of {what}"):
            dist.all_reduce(total, dist.ReduceOp.MAX, group=self.group)
        return total

    def gather(self, x: Tensor, what: str) -> Tensor:
        """[size, ...]: every rank's `x` [...], by rank."""
        if self.group is None:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with deadline(f"the gathering of {what}"):
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def scatter_sum(self, parts: Tensor, what: str) -> Tensor:
        """Of parts[size, ...]: entry `rank`, summed over every rank's."""
        if self.group is None:
            return parts.squeeze(0)
        mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        with deadline(f"the scattered sum of {what}"):
            dist.reduce_scatter(mine, list(parts.contiguous().unbind()), group=self.group)
        return mine

    def exchange(self, x: Tensor, what: str) -> Tensor:
        """[size, ...]: of every rank's `x` [size, ...] the part meant for this rank, by rank. Its own inverse."""
        if self.group is None:
            return x
        x = x.contiguous()
        parts = torch.empty_like(x)
        with deadline(f"the exchange of {what}"):
            dist.all_to_all_single(parts, x, group=self.group)
        return parts

    def pass_on(self, x: Tensor, what: str) -> Arrival:
        """Start one hop round the ring: `x` goes to the next rank, and its like comes from the rank before. Hops that
        are under way at once arrive in the order in which all ranks started them."""
        if self.group is None:
            return Arrival(what, [], x, x)
        phase, sent = f"the hop of {what}", x.contiguous()
        came = torch.empty_like(sent)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with deadline(phase):
            there = dist.P2POp(dist.isend, sent, group=self.group, group_peer=after)
            here = dist.P2POp(dist.irecv, came, group=self.group, group_peer=before)
            return Arrival(phase, dist.batch_isend_irecv([there, here]), sent, came)
