"""One DeviceMesh for everything: every rank of an engine has a place in it, every layout is a choice of its axis sizes.

Axes, outermost first: data_replicate (ranks that hold the same shards) and data_shard (ranks that share out the
parameters). Both cut the batch; together they are the data ranks. Context, tensor and pipeline take their place here.
"""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from framework.core.runtime import Runtime
from framework.parallel.config import ParallelConfig, Shard

DATA_REPLICATE = "data_replicate"
DATA_SHARD = "data_shard"
DATA = (DATA_REPLICATE, DATA_SHARD)


def build_mesh(config: ParallelConfig, runtime: Runtime) -> DeviceMesh | None:
    """The mesh over the world; None for one process, where every layout is `single`. Collective."""
    config.check_world(runtime.world_size)
    if runtime.world_size == 1:
        return None
    return init_device_mesh(runtime.device.type, axis_sizes(config, runtime.world_size), mesh_dim_names=DATA)


def axis_sizes(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(data_replicate, data_shard) of a layout on `world_size` ranks."""
    return (1, world_size) if config.shard is Shard.FULL else (world_size, 1)
