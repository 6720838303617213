"""How a model is laid out over ranks."""

from dataclasses import dataclass

from framework.core.config import Choice, require


class Shard(Choice):
    """Whether data ranks share out the parameters."""

    NONE = "none"  # every data rank holds the whole model
    FULL = "full"  # FSDP2: parameters, gradients and optimizer states are sharded over data ranks


@dataclass(frozen=True)
class ParallelConfig:
    """`parallel=single|fsdp|ddp`; data ranks are what the world leaves after the other axes."""

    name: str = "single"
    shard: Shard = Shard.NONE

    def check_world(self, world_size: int) -> None:
        """Refuse a world that the layout cannot fill."""
        require(
            world_size == 1 or self.name != "single",
            f"parallel=single runs on one process, the world has {world_size}; choose parallel=fsdp or ddp",
        )
