"""FSDP2 (Zhao et al. 2023; torch's fully_shard): parameters, gradients and optimizer states shared out over data ranks.

And what follows from it for anyone who holds a parameter: which part of the whole is here (`box_of`, `local`), and who
speaks for a part that several ranks hold (`is_owner`). Left out: tensor-parallel placements.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from framework.core.records import Box, whole
from framework.parallel.mesh import DATA, DATA_REPLICATE, DATA_SHARD


def shard(module: nn.Module, blocks: list[str], mesh: DeviceMesh, compute: torch.dtype, reduce: torch.dtype) -> None:
    """Shard each of `blocks` (module paths), then what is left at the root, over the data ranks of `mesh`.

    Parameters are gathered in `compute`, gradients summed in `reduce`. Inputs are never cast: a record brings numbers,
    advantages say, that are not the model's.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    ranks = mesh[DATA] if mesh[DATA_REPLICATE].size() > 1 else mesh[DATA_SHARD]
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


def box_of(tensor: Tensor) -> Box:
    """Where this rank's part stands in the whole."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(zip(offsets, lengths, strict=True))


def is_owner(tensor: Tensor, is_first: bool) -> bool:
    """Whether this rank speaks for its part: of the ranks that hold the same part, the first one does. `is_first`
    answers for plain tensors, which all ranks hold."""
    if not isinstance(tensor, DTensor):
        return is_first
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    replicas = [where for where, how in zip(place, tensor.placements) if isinstance(how, Replicate)]
    return not any(replicas) and all(length > 0 for _, length in box_of(tensor))
