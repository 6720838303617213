"""The one order in which a layout is put on a module: pipeline cut, tensor/expert, context, recompute, compile, shard.

The module stands on the meta device, so nothing is allocated before it is cut; its weights come afterwards, part by
part. A plan is data: module paths. No model class is known here.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from framework.parallel.shard import shard


def apply(
    module: nn.Module, blocks: list[str], mesh: DeviceMesh | None, *, compile: bool, compute: torch.dtype
) -> nn.Module:
    """Compile and shard `module`, in place. `blocks` are the paths of its repeated parts; `compute` is the dtype of
    forward and backward, gradients are summed in the parameters' own."""
    if compile:
        for path in blocks:
            module.get_submodule(path).compile()
    if mesh is not None:
        master = next(module.parameters()).dtype
        shard(module, blocks, mesh, compute, reduce=master)
    return module
