"""Every rank of an engine has a place in one mesh; every layout is a choice of its axis sizes.

Axes, outermost first: pipeline (ranks that share the layers), data_replicate (ranks that hold the same shards),
data_shard (ranks that share out the parameters), context (ranks that share a row's places), tensor (ranks that share
every matrix; they talk most and so stand closest). The two data axes together are the data ranks, which take rows of
their own; the others get the same rows.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from framework.core.runtime import Runtime
from framework.parallel.collectives import DATA, Ranks
from framework.parallel.config import AXES, ParallelConfig

_REPLICATE, _SHARD = "replicate", "shard"


@dataclass(frozen=True)
class Mesh:
    """Ranks by axis. `holders`, of axes (pipeline, replicate, shard, tensor), says who shares out parameters: context
    ranks hold the same ones and sum their gradients, so they stand in for data ranks there. Both None: one process."""

    axes: DeviceMesh | None = None
    holders: DeviceMesh | None = None

    def ranks(self, *axes: str) -> Ranks:
        """The ranks along `axes` that this rank is one of."""
        return Ranks(self.axes, axes)

    def size(self, axis: str) -> int:
        return 1 if self.axes is None else self.axes[axis].size()

    def place(self, axis: str) -> int:
        """This rank's number along `axis`."""
        return 0 if self.axes is None else self.axes.get_local_rank(axis)

    def lines(self, axis: str) -> list[list[int]]:
        """The ranks of the world along `axis`, one list for each choice of the others."""
        if self.axes is None:
            return [[0]]
        table = self.axes.mesh.movedim(AXES.index(axis), -1)
        return [[int(rank) for rank in line] for line in table.reshape(-1, table.shape[-1])]

    def pipeline_ends(self) -> Ranks:
        """This rank's pipeline's first and last rank; alone where it is neither. Collective."""
        lines = self.lines("pipeline")
        return Ranks.among([[line[0], line[-1]] for line in lines]) if len(lines[0]) > 1 else Ranks(None)

    @property
    def sharing(self) -> DeviceMesh | None:
        """(replicate, shard) of this rank's parameters, or (shard); None where no other rank holds any of them."""
        if self.holders is None:
            return None
        sharing = self.holders[(_REPLICATE, _SHARD)]
        if sharing.size() == 1:
            return None
        return sharing if self.holders[_REPLICATE].size() > 1 else self.holders[_SHARD]

    @property
    def speaks_for_row(self) -> bool:
        """Whether this rank answers for its rows among those that got the same ones."""
        return not any(self.place(axis) for axis in AXES if axis not in DATA)


def build_mesh(config: ParallelConfig, runtime: Runtime) -> Mesh:
    """The mesh over the world. Collective."""
    sizes = config.sizes(runtime.world_size)
    if runtime.world_size == 1:
        return Mesh()
    kind = runtime.device.type
    axes = init_device_mesh(kind, tuple(sizes[axis] for axis in AXES), mesh_dim_names=AXES)
    shape = (sizes["pipeline"], *_held(config, sizes), sizes["tensor"])
    holders = init_device_mesh(kind, shape, mesh_dim_names=("pipeline", _REPLICATE, _SHARD, "tensor"))
    return Mesh(axes, holders)


def _held(config: ParallelConfig, sizes: dict[str, int]) -> tuple[int, int]:
    """(replicate, shard): context ranks share out parameters as data ranks do, or replicate them as those do."""
    replicate, shard, context = sizes["data_replicate"], sizes["data_shard"], sizes["context"]
    return (replicate * context, shard) if config.shard == 1 else (replicate, shard * context)
