"""A layout in words, for the map of ranks that is printed before a model is built.

Left out: finding out which nodes and devices there are.
"""

from collections.abc import Mapping

from framework.parallel.config import AXES, ParallelConfig

_CALLED = dict(zip(AXES, ("pipeline", "replicate", "shard", "context", "tensor"), strict=True))
_ZERO = {1: "states", 2: "states and gradients", 3: "states, gradients and parameters"}


def layout_in_words(config: ParallelConfig, world_size: int) -> str:
    """Example: "3d = pipeline 2 x shard 2 x tensor 2", outermost first. UsageError where it cannot fill the world."""
    extents = [f"{_name(config, axis)} {size}" for axis, size in config.sizes(world_size).items() if size > 1]
    words = f"{config.name} = {' x '.join(extents) or 'one process'}"
    if config.zero:
        words += f", ZeRO-{config.zero} shares out {_ZERO[config.zero]}"
    return words + (", what is not in use waits in CPU memory" if config.offload else "")


def node_in_words(devices: Mapping[int, str], config: ParallelConfig | None, world_size: int) -> str:
    """Which ranks stand on a node, by {rank: device}, and where in the layout; None: they hold the same.

    Example: "rank 0 on cuda:0 at pipeline 0 tensor 0, rank 1 on cuda:1 at pipeline 0 tensor 1"."""
    places = ("" if config is None else _place(config, rank, world_size) for rank in devices)
    return ", ".join(f"rank {rank} on {devices[rank]}{place}" for rank, place in zip(devices, places))


def _place(config: ParallelConfig, rank: int, world_size: int) -> str:
    sizes = config.sizes(world_size)
    place = [f" {_name(config, axis)} {n}" for axis, n in config.place(rank, world_size).items() if sizes[axis] > 1]
    return f" at{''.join(place)}" if place else ""


def _name(config: ParallelConfig, axis: str) -> str:
    return "data" if config.zero and axis == "data_replicate" else _CALLED[axis]
