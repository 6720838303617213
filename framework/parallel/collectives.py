"""Sums and gathers over ranks, each named, so that a rank that waits in vain can say where it stands (law Deadline).

The time limit itself is the process group's (`core.runtime.start`). Left out: FSDP's own collectives; they run inside
`deadline`, which names the phase.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from framework.core.errors import DeadlineError
from framework.parallel.mesh import DATA

# How gloo and NCCL say that a peer is late or gone. Anything else is our own error and keeps its traceback.
_SYMPTOMS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "connection refused")


class Ranks:
    """The ranks along some axes of the mesh. Without a mesh: this process alone, and every sum is its own."""

    def __init__(self, mesh: DeviceMesh | None, axes: tuple[str, ...] = DATA):
        flat = None if mesh is None else mesh[axes]._flatten("_".join(axes))
        self.group = None if flat is None else flat.get_group()
        self.size = 1 if flat is None else flat.size()
        self.rank = 0 if flat is None else flat.get_local_rank()

    def sum(self, x: Tensor, what: str) -> Tensor:
        """The sum of every rank's `x` [...], the same bits on all of them. `what` names it in errors."""
        if self.group is None:
            return x
        total = x.clone()
        with deadline(f"the sum of {what}"):
            dist.all_reduce(total, group=self.group)
        return total

    def gather(self, x: Tensor, what: str) -> Tensor:
        """[size, ...]: every rank's `x` [...], by rank."""
        if self.group is None:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with deadline(f"the gathering of {what}"):
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)


@contextlib.contextmanager
def deadline(phase: str) -> Iterator[None]:
    """Name the phase, and this rank, in the error of a collective inside that a peer never joined."""
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and any(symptom in str(error).lower() for symptom in _SYMPTOMS)):
            raise
        rank, size = dist.get_rank(), dist.get_world_size()
        reason = str(error).strip().splitlines()[0]
        raise DeadlineError(
            f"rank {rank} of {size} waited in vain in {phase}: another rank died, hangs or left ({reason})"
        ) from error
