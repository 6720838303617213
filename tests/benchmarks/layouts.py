"""What a step of the engine costs beside the barest loop in the same layout, on one process and on two ranks.

The same model, weights and rows. Rivals: a loop of one's own; `fully_shard`, which is torch's FSDP2;
`parallelize_module` with sequence parallelism and a parallel loss, its tensor parallelism; `deepspeed.initialize` as
DeepSpeed's tutorial has it. All with torch's fused AdamW and the gradient clipped. Every contestant says its loss after
two updates: one number for all. Left out: data and logging (`step`). Processor time counts rank 0 alone.
"""

import contextlib
import ctypes
import functools
import io
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from framework.core import runtime
from framework.core.records import TokenBatch
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig
from framework.models.config import ModelConfig
from framework.models.init import fill, random_weights
from framework.models.transformer import Transformer
from framework.optim.config import OptimConfig, Schedule
from framework.parallel.config import ParallelConfig
from framework.stages.pretrain import token_loss
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.benchmarks.material import INIT_STD

LR, CLIP = 1e-3, 1.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
LAYOUTS = {
    "single": ParallelConfig(),
    "fsdp": ParallelConfig("fsdp", shard=0),
    "tp": ParallelConfig("tp", tensor=0),
    "zero1": ParallelConfig("zero1", zero=1),
    "zero2": ParallelConfig("zero2", zero=2),
    "zero3": ParallelConfig("zero3", zero=3),
}


@dataclass(frozen=True)
class Task:
    """The same for all. A lap is `steps` steps of `rows` rows, over all ranks, of `places` tokens."""

    width: int
    layers: int
    vocab: int
    rows: int
    places: int
    steps: int
    threads: int

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=4,
            init_std=INIT_STD,
            tied=False,
        )

    def batch(self, step: int) -> TokenBatch:
        """Random tokens, one document a row, every label but the last."""
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.vocab, (self.rows, self.places + 1), generator=generator)
        everything = torch.ones(self.rows, self.places, dtype=torch.int64)
        positions = torch.arange(self.places).expand(self.rows, -1)
        return TokenBatch(tokens[:, :-1], tokens[:, 1:], everything.bool(), positions, everything)


class Loop(Protocol):
    """What is raced. Collective."""

    def step(self, rows: TokenBatch) -> None:
        """Forward, backward and update on this rank's rows."""

    def loss(self, rows: TokenBatch) -> float:
        """Mean over the labels of all ranks' rows."""


Build = Callable[[Runtime, Task], Loop]


# --- ours ----------------------------------------------------------------------------------------------------------


class Ours:
    """The engine, as the stages drive it."""

    def __init__(self, here: Runtime, task: Task, parallel: ParallelConfig):
        optim = OptimConfig(lr=LR, clip=CLIP, beta2=0.999, weight_decay=0.0, schedule=Schedule.CONSTANT, warmup=0)
        self.engine = build_engine(
            task.model,
            runtime=here,
            parallel=parallel,
            config=EngineConfig(),
            micro_size=task.rows // sharers(here.world_size, parallel.name),
            optim=optim,
            total_steps=1,
            weights=random_weights(task.model, seed=0),
        )

    def step(self, rows: TokenBatch) -> None:
        """See `Loop`."""
        self.engine.forward_backward(rows, token_loss)
        self.engine.step()

    def loss(self, rows: TokenBatch) -> float:
        """See `Loop`."""
        total, weight = self.engine.measure(rows, token_loss)["loss"]
        return float(total / weight)


# --- theirs --------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Tensors in, mean loss out, with all logits between, as a notebook would have it."""

    def __init__(self, task: Task):
        super().__init__()
        with torch.device("meta"):
            body = Transformer(task.model)
        self.body = fill(body, random_weights(task.model, seed=0))

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, document_ids: Tensor) -> Tensor:
        """Each [B,T] -> []."""
        hidden = self.body(tokens, positions=positions, document_ids=document_ids)
        return F.cross_entropy(self.body.head(hidden).flatten(0, 1), labels.flatten())


class Bare:
    """Forward, loss, backward, clip, update."""

    def __init__(self, module: nn.Module, inside: Callable[[], Any] = contextlib.nullcontext):
        self.module, self.inside = module, inside
        self.optimizer = adamw(module)

    def step(self, rows: TokenBatch) -> None:
        """See `Loop`."""
        with self.inside():
            self.module(*given(rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, rows: TokenBatch) -> float:
        """See `Loop`."""
        with self.inside(), torch.no_grad():
            return averaged(self.module(*given(rows)))


class Zero:
    """DeepSpeed's own three lines."""

    def __init__(self, here: Runtime, task: Task, stage: int):
        os.environ |= {"DS_ACCELERATOR": here.device.type, "LOCAL_RANK": str(here.local_rank)}
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes first
        deepspeed.utils.logger.setLevel("ERROR")
        module = Plain(task)
        told = {
            "train_micro_batch_size_per_gpu": task.rows // here.world_size,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW for all
            "steps_per_print": 1 << 62,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=adamw(module), config=told, dist_init_required=False
            )

    def step(self, rows: TokenBatch) -> None:
        """See `Loop`."""
        self.engine.backward(self.engine(*given(rows)))
        self.engine.step()

    def loss(self, rows: TokenBatch) -> float:
        """See `Loop`."""
        with torch.no_grad():
            return averaged(self.engine(*given(rows)))


def single(here: Runtime, task: Task) -> Loop:
    """One process."""
    return Bare(Plain(task))


def fsdp2(here: Runtime, task: Task) -> Loop:
    """Block by block, as torch's tutorial has it."""
    module = Plain(task)
    for layer in module.body.layers.values():
        fully_shard(layer)
    fully_shard(module)
    return Bare(module)


class NormOfSum(ParallelStyle):
    """As SequenceParallel, for a norm that takes a residual beside its input and gives their sum beside its output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, self._share, self._keep)

    @staticmethod
    def _share(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(x, mesh, [Shard(1)], run_check=False) for x in inputs)

    @staticmethod
    def _keep(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        return outputs[0], outputs[1].to_local()


def tensor_parallel(here: Runtime, task: Task) -> Loop:
    """As torch's tutorial has it for a Llama, sequence parallel, with a parallel loss."""
    module, mesh = Plain(task), init_device_mesh("cpu", (here.world_size,))
    cut, whole = Shard(1), Replicate()
    layer: dict[str, Any] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(cut, None), desired_input_layouts=(whole, None)),
        "attention.o": RowwiseParallel(output_layouts=cut),
        "mlp_norm": NormOfSum(),
        "mlp": PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(whole,)),
        "mlp.down": RowwiseParallel(output_layouts=cut),
    }
    layer |= {name: ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")}
    ends: dict[str, Any] = {
        "body.embedding": RowwiseParallel(input_layouts=whole, output_layouts=cut),
        "body.norm": SequenceParallel(),
        "body.head": ColwiseParallel(input_layouts=cut, output_layouts=Shard(-1), use_local_output=False),
    }
    plan = {f"body.layers.{n}.{path}": style for n in range(task.layers) for path, style in layer.items()}
    return Bare(parallelize_module(module, mesh, plan | ends), inside=loss_parallel)


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """torch's fastest."""
    return torch.optim.AdamW(module.parameters(), lr=LR, eps=1e-8, weight_decay=0.0, betas=(0.9, 0.999), fused=True)


def given(rows: TokenBatch) -> tuple[Tensor, ...]:
    """What `Plain` takes."""
    return rows.tokens, rows.labels, rows.positions, rows.document_ids


def averaged(loss: Tensor) -> float:
    """Over ranks, each of which has as many labels."""
    total = loss.full_tensor() if isinstance(loss, DTensor) else loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / (dist.get_world_size() if dist.is_initialized() else 1)


RIVALS: dict[str, tuple[str, Build]] = {
    "single": ("bare loop", single),
    "fsdp": ("fully_shard", fsdp2),
    "tp": ("parallelize_module", tensor_parallel),
    "zero1": ("deepspeed.initialize", functools.partial(Zero, stage=1)),
    "zero2": ("deepspeed.initialize", functools.partial(Zero, stage=2)),
    "zero3": ("deepspeed.initialize", functools.partial(Zero, stage=3)),
}


# --- ranks ---------------------------------------------------------------------------------------------------------


def run(place: Path, laps: Laps, task: Task, layout: str, build: Build) -> None:
    """This process is rank 0, the others are its children: they halt where it does."""
    world = 1 if layout == "single" else 2
    address = f"127.0.0.1:{runtime.free_port()}"
    fork = multiprocessing.get_context("fork")
    others = [
        fork.Process(target=_follow, args=(task, layout, build, rank, world, address), daemon=True)
        for rank in range(1, world)
    ]
    for process in others:
        process.start()
    try:
        _race(laps, task, layout, build, 0, world, address)
    finally:
        for process in others:
            process.kill()
        runtime.stop()


def _follow(*arguments: Any) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # a contest ends by killing rank 0
    _race(None, *arguments)


def _race(laps: Laps | None, task: Task, layout: str, build: Build, rank: int, world: int, address: str) -> None:
    here = runtime.start("cpu", task.threads, rank=rank, world_size=world, address=address)
    loop = build(here, task)
    mine = slice(rank % sharers(world, layout), None, sharers(world, layout))

    def steps(first: int, number: int) -> None:
        for step in range(first, first + number):
            loop.step(task.batch(step).select(mine))

    steps(0, 2)
    loss = loop.loss(task.batch(2).select(mine))
    if laps is not None:
        laps.ready({"tokens a step": task.rows * task.places}, {"loss after two updates": loss})
    first = 2
    while True:
        if world > 1:
            dist.barrier()
        steps(first, task.steps)
        first += task.steps
        if laps is not None:
            laps.done(task.steps * task.rows * task.places, 0)


def sharers(world: int, layout: str) -> int:
    """Ranks that share out the rows."""
    return 1 if layout in ("single", "tp") else world


def contestants(task: Task, layout: str) -> dict[str, Run]:
    """Ours first."""
    name, rival = RIVALS[layout]
    ours = functools.partial(Ours, parallel=LAYOUTS[layout])
    builds: dict[str, Build] = {f"engine, {layout}": ours, f"{name}, {layout}": rival}
    return {name: functools.partial(run, task=task, layout=layout, build=build) for name, build in builds.items()}


def main(argv: list[str] | None = None) -> None:
    """Run all layouts one after another; two ranks of one thread."""
    sizes = {"width": 256, "layers": 4, "vocab": 4096, "rows": 16, "places": 256, "steps": 1, "threads": 1}
    args = options(__doc__ or "", argv, rounds=20, **sizes)
    task = Task(**{name: getattr(args, name) for name in sizes})
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as scratch:
            contest = compete(contestants(task, layout), Path(scratch), args.rounds)
            report(f"Layout {layout}", contest, asdict(task), args.out)


if __name__ == "__main__":
    main()
