"""The engine that a recipe's `parallel` asks for: plain torch, or DeepSpeed where `parallel.zero` is set."""

from collections.abc import Callable

from framework.core.records import ReadBox
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig
from framework.engine.deepspeed_engine import build_deepspeed_engine
from framework.engine.protocol import Engine
from framework.engine.torch_engine import build_torch_engine
from framework.models.config import LoraConfig, ModelConfig
from framework.optim.config import OptimConfig
from framework.parallel.config import ParallelConfig


def build_engine(
    model: ModelConfig,
    *,
    runtime: Runtime,
    parallel: ParallelConfig,
    config: EngineConfig,
    micro_size: int,
    optim: OptimConfig | None,
    total_steps: int,
    weights: ReadBox,
    value_head: bool = False,
    num_classes: int = 0,
    temperature: float = 1.0,
    frozen: frozenset[str] = frozenset(),
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Engine:
    """An engine with its weights, laid out over the ranks of the world. Collective.

    `micro_size`: rows per forward (pairs count once). `optim` None: an engine that only infers. `temperature` divides
    the logits of every log-prob. `frozen`: logical names of parameters that do not learn; `lora`: the
    adapter that does, whose parameters `weights` gives too; `seed`: of its dropout.
    """
    if parallel.zero in (1, 2) and optim is None:  # no states and no gradients that could be shared out
        parallel = ParallelConfig("ddp")
    build: Callable[..., Engine] = build_deepspeed_engine if parallel.zero else build_torch_engine
    return build(
        model,
        runtime=runtime,
        parallel=parallel,
        config=config,
        micro_size=micro_size,
        optim=optim,
        total_steps=total_steps,
        weights=weights,
        value_head=value_head,
        num_classes=num_classes,
        temperature=temperature,
        frozen=frozen,
        lora=lora,
        seed=seed,
    )
