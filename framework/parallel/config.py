"""How a model is laid out over ranks."""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from math import prod

from framework.core.config import Choice, require


class ContextForm(Choice):
    """How the ranks that share a row's places attend to each other's keys."""

    RING = "ring"  # keys and values travel round (Liu et al. 2023)
    EXCHANGE = "exchange"  # an all-to-all turns places into heads and back (Jacobs et al. 2023)


class Schedule(Choice):
    """The order in which a pipeline's stages take micro-batches."""

    GPIPE = "gpipe"  # all forwards, then all backwards (Huang et al. 2019)
    ONE_F_ONE_B = "1f1b"  # a backward as soon as one can be had (Narayanan et al. 2019)
    INTERLEAVED = "interleaved"  # 1f1b with two stages a rank, half the bubble (Narayanan et al. 2021)


class Recompute(Choice):
    """What a block keeps for its backward pass."""

    NONE = "none"  # everything
    SELECTIVE = "selective"  # the outcomes of matrix products
    FULL = "full"  # its input


AXES = ("pipeline", "data_replicate", "data_shard", "context", "tensor")  # outermost first


@dataclass(frozen=True)
class ParallelConfig:
    """`parallel=single|ddp|fsdp|tp|…`; data ranks are what the other axes leave of the world.

    0 means "all there are": `shard` of the data ranks, one of `tensor`, `context` and `pipeline` of the whole world.
    """

    name: str = "single"
    shard: int = 1  # data ranks that share out the parameters, gradients and states; 1 = each holds them all
    tensor: int = 1  # ranks that share every matrix, and the places of a row between matrices
    context: int = 1  # ranks that share the places of every row
    context_form: ContextForm = ContextForm.RING
    pipeline: int = 1  # ranks that share the layers
    schedule: Schedule = Schedule.ONE_F_ONE_B
    recompute: Recompute = Recompute.NONE
    zero: int = 0  # DeepSpeed: 1 shares out the optimizer's states, 2 gradients too, 3 parameters too; 0 = plain torch
    offload: bool = False  # zero=3: the optimizer's states and the parameters wait in CPU memory

    def __post_init__(self) -> None:
        for axis in ("shard", "tensor", "context", "pipeline"):
            size = getattr(self, axis)
            require(size >= 0, f"parallel.{axis}={size} must be a number of ranks; 0 = all there are")
        open_axes = [f"parallel.{axis}=0" for axis, size in self._model_axes().items() if size == 0]
        require(len(open_axes) < 2, f"{' and '.join(open_axes)} cannot both be all there are; name one of them")
        self._check_zero()

    def _check_zero(self) -> None:
        """DeepSpeed serves the data axis alone."""
        require(self.zero in (0, 1, 2, 3), f"parallel.zero={self.zero}: choose 1, 2 or 3; 0 = without DeepSpeed")
        require(
            self.zero == 3 or not self.offload,
            f"parallel.offload=true needs parallel.zero=3, not {self.zero}: choose parallel=zero3_offload",
        )
        require(
            self.zero != 3 or self.recompute is not Recompute.SELECTIVE,
            f"parallel.recompute=selective does not go with parallel={self.name}: ZeRO-3 gathers parameters within a "
            "block, and what is gathered cannot be told from what is computed; choose full or none",
        )
        for axis in fields(self):
            given = getattr(self, axis.name)
            require(
                self.zero == 0 or axis.name in ("name", "zero", "offload", "recompute") or given == axis.default,
                f"parallel.zero={self.zero} does not go with parallel.{axis.name}={given}: DeepSpeed serves the data "
                "ranks alone; leave one of them out",
            )

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages that one rank holds."""
        return 2 if self.schedule is Schedule.INTERLEAVED else 1

    @property
    def cuts_the_model(self) -> bool:
        """Whether a row takes several ranks."""
        return any(size != 1 for size in self._model_axes().values())

    def sizes(self, world_size: int) -> dict[str, int]:
        """Ranks along each of AXES on `world_size` ranks; refuses a world that the layout cannot fill."""
        require(
            world_size == 1 or self.name != "single",
            f"parallel=single runs on one process, the world has {world_size}; choose parallel=fsdp or ddp",
        )
        if self.zero:
            require_deepspeed()
        given = self._model_axes()
        named = prod(size for size in given.values() if size)
        words = ", ".join(f"parallel.{axis}={size}" for axis, size in given.items() if size != 1)
        require(
            world_size % named == 0,
            f"{words} needs a multiple of {named} processes, the world has {world_size}; "
            f"start it on {named} or {2 * named} (cluster.workers={named})",
        )
        left = world_size // named
        model = {axis: size or left for axis, size in given.items()}
        data = world_size // prod(model.values())
        shard = self.shard or data
        require(
            data % shard == 0,
            f"parallel.shard={shard} does not divide {data} data ranks; choose {_divisors(data)}, or 0 for all",
        )
        found = {"data_replicate": data // shard, "data_shard": shard, **model}
        return {axis: found[axis] for axis in AXES}

    def place(self, rank: int, world_size: int) -> dict[str, int]:
        """The number of `rank` along each of AXES: what Mesh.place says on it."""
        place = {}
        for axis, size in reversed(self.sizes(world_size).items()):
            rank, place[axis] = divmod(rank, size)
        return {axis: place[axis] for axis in AXES}

    def check_world(self, world_size: int) -> None:
        """Refuse a world that the layout cannot fill."""
        self.sizes(world_size)

    def data_size(self, world_size: int) -> int:
        """Ranks that take rows of their own."""
        sizes = self.sizes(world_size)
        return sizes["data_replicate"] * sizes["data_shard"]

    def _model_axes(self) -> dict[str, int]:
        return {"context": self.context, "tensor": self.tensor, "pipeline": self.pipeline}


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def require_deepspeed() -> None:
    """Refuse ZeRO where DeepSpeed is not installed; nothing is imported."""
    try:
        found = find_spec("deepspeed") is not None
    except (ImportError, ValueError):
        found = False
    require(
        found,
        'ZeRO needs DeepSpeed, which is not installed: pip install "framework[deepspeed]", or take parallel=fsdp, '
        "which shares out the same without it",
    )
