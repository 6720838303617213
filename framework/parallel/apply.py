"""The one order in which a layout is put on a module: pipeline cut, tensor/expert, context, recompute, compile, shard.

The module stands on the meta device, so nothing is allocated before it is cut; its weights come afterwards, part by
part. A plan is data: module path -> style. Tensor cuts come before sharding, which shares out what they leave;
recomputation before compilation, whose partitioner then sees its marks; compilation before sharding, whose hooks stay
outside of graphs. No model class is known here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from framework.core.records import whole
from framework.parallel.config import Recompute
from framework.parallel.mesh import Mesh
from framework.parallel.recompute import recompute
from framework.parallel.shard import Part, shard
from framework.parallel.tensor import Parts, Style


@dataclass(frozen=True)
class Plan:
    """How one module lies over ranks; paths are module paths.

    Example: Plan(blocks=["layers.0"], styles={"layers.0.mlp.up": columns}, dropped=["layers.1"]).
    """

    blocks: Sequence[str]  # repeated parts: what is computed again, compiled and sharded as one
    styles: Mapping[str, Style] = field(default_factory=dict)
    exchanged: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)  # parameterless parts
    dropped: Sequence[str] = ()  # parts that another pipeline stage holds


def apply(
    module: nn.Module,
    plan: Plan,
    mesh: Mesh,
    *,
    compile: bool = False,
    compute: torch.dtype = torch.float32,
    again: Recompute = Recompute.NONE,
) -> Parts:
    """Lay `module` out, in place; where the parts stand that its parameters, by name, have become. `compute` is the
    dtype of forward and backward, gradients are summed in the parameters' own. `again`: what backward computes again.
    """
    for path in plan.dropped:
        _put(module, path, None)
    parts = _styled(module, plan.styles, mesh)
    for path, build in plan.exchanged.items():
        _put(module, path, build())
    for path in plan.blocks:
        recompute(module.get_submodule(path), again)
        if compile:
            module.get_submodule(path).compile()
    if mesh.sharing is not None:
        master = next(module.parameters()).dtype
        shard(module, plan.blocks, mesh.sharing, compute, reduce=master)
    return parts


def _styled(module: nn.Module, styles: Mapping[str, Style], mesh: Mesh) -> Parts:
    ranks = mesh.ranks("tensor")
    alike = ranks.rank == 0
    parts = {name: Part(tuple(p.shape), whole(p.shape), speaks=alike) for name, p in module.named_parameters()}
    for path, style in styles.items():
        for name, part in style(module.get_submodule(path), ranks).items():
            parts[f"{path}.{name}"] = part
    return parts


def _put(module: nn.Module, path: str, part: nn.Module | None) -> None:
    """Exchange the part at `path`, or take it away."""
    owner, _, leaf = path.rpartition(".")
    holder = module.get_submodule(owner)
    if part is None and isinstance(holder, nn.ModuleDict):
        del holder[leaf]
    else:
        setattr(holder, leaf, part)
