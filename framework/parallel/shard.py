"""FSDP2 (Zhao et al. 2023; torch's fully_shard): parameters, gradients and optimizer states shared out over data ranks.

And what follows from it, and from the cuts before it, for anyone who holds a parameter: which part of the whole is here
(`Part.box_of`, `local`), and who speaks for a part that several ranks hold (`Part.is_owner`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from framework.core.records import Box, whole


@dataclass(frozen=True)
class Part:
    """What a module's own parameter is of the whole one, before data ranks share it out.

    Example, the left half of a matrix [8, 6] cut over two tensor ranks: Part((8, 6), ((0, 8), (0, 3))).
    """

    shape: tuple[int, ...]  # of the whole
    box: Box
    speaks: bool = True  # of the ranks that share a row and hold this same part, this one answers for it
    summed_over: str = ""  # the axis of ranks that each hold a summand of its gradient; "" = none

    def box_of(self, parameter: Tensor) -> Box:
        """Where this rank's part of `parameter`, sharded or not, stands in the whole."""
        return tuple((base + offset, length) for (base, _), (offset, length) in zip(self.box, _box_within(parameter)))

    def is_owner(self, parameter: Tensor) -> bool:
        """Whether this rank speaks for its part: of all ranks that hold the same, one does."""
        if not isinstance(parameter, DTensor):
            return self.speaks
        place = parameter.device_mesh.get_coordinate()
        assert place is not None
        replicas = [where for where, how in zip(place, parameter.placements) if isinstance(how, Replicate)]
        return self.speaks and not any(replicas) and all(length > 0 for _, length in _box_within(parameter))


def shard(
    module: nn.Module, blocks: Sequence[str], ranks: DeviceMesh, compute: torch.dtype, reduce: torch.dtype
) -> None:
    """Shard each of `blocks` (module paths), then what is left, over `ranks`, (replicate, shard) or (shard).

    Parameters are gathered in `compute`, gradients summed in `reduce`. Inputs are never cast: a record brings numbers,
    advantages say, that are not the model's.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    for path in blocks:
        fully_shard(module.get_submodule(path), mesh=ranks, mp_policy=policy)
    fully_shard(module, mesh=ranks, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The loss is a sum over a global count, so gradients add up. Averaging is FSDP's default, and without
            # the second line a factor of 1 asks for a reduction that gloo does not have.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def reshard(module: nn.Module) -> None:
    """Drop gathered parameters. After a forward without backward the root keeps its own, and whoever then changes or
    reads weights would have the old ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory: all of it for a plain tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank. Collective where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _box_within(tensor: Tensor) -> Box:
    """Where this rank's part stands in what a module holds."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(zip(offsets, lengths, strict=True))
