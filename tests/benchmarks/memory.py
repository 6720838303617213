"""Peak memory of the fullest rank under each layout, beside what `framework.planning.memory` says: the real engine on
gloo ranks of this CPU, a Llama, three optimizer steps of three micro-batches each.

A rank is a process of its own. It first takes a step with a tiny model under the same layout, so that libraries,
threads and connections are there; then the kernel's record of its resident memory (VmHWM) is set back, and what the
record says after the last step above what was resident before the model is what is measured. One setting of the C
library's: blocks from 64 KiB on come from the system and go back to it when they are freed (M_MMAP_THRESHOLD), or what
it keeps for later would be counted as used.
"""

import ctypes
import gc
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch import Tensor

from framework.core.records import Box, TokenBatch
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig, Precision
from framework.engine.precision import COMPUTE, MASTER
from framework.models.config import ModelConfig
from framework.optim.config import OptimConfig
from framework.parallel.config import ParallelConfig
from framework.planning.memory import Batch, Numbers, RankMemory, fullest
from framework.planning.parameters import num_parameters
from framework.stages.pretrain import token_loss
from tests.benchmarks.contest import machine, options
from tests.distributed import run_ranks

MIB = 2**20
_M_MMAP_THRESHOLD = -3
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "ddp": (2, ParallelConfig("ddp")),
    "fsdp": (2, ParallelConfig("fsdp", shard=0)),
    "hsdp": (4, ParallelConfig("hsdp", shard=2)),
    "tp": (2, ParallelConfig("tp", tensor=0)),
    "pp": (2, ParallelConfig("pp", pipeline=0)),
    "cp": (2, ParallelConfig("cp", shard=0, context=0)),
    "fsdp_tp": (4, ParallelConfig("fsdp_tp", shard=0, tensor=2)),
    "3d": (4, ParallelConfig("3d", shard=0, tensor=2, pipeline=2)),
    "zero1": (2, ParallelConfig("zero1", zero=1)),
    "zero2": (2, ParallelConfig("zero2", zero=2)),
    "zero3": (2, ParallelConfig("zero3", zero=3)),
}


@dataclass(frozen=True)
class Task:
    """The same for all layouts."""

    width: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    micros: int
    steps: int
    precision: Precision = Precision.FP32

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(vocab_size=self.vocabulary, hidden_size=self.width, num_layers=self.layers, num_heads=8)

    @property
    def batch(self) -> Batch:
        return Batch(self.rows, self.length, self.micros)


@dataclass(frozen=True)
class Finding:
    """What a layout needs by the formula, and what its fullest rank took, in bytes."""

    layout: str
    ranks: int
    formula: RankMemory
    measured: int

    @property
    def ratio(self) -> float:
        return self.measured / self.formula.total


def packed(task: Task, seed: int) -> TokenBatch:
    """One data rank's rows of a step; every label counts."""
    shape = (task.rows * task.micros, task.length)
    tokens = torch.randint(task.vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    every = torch.ones(shape, dtype=torch.bool)
    return TokenBatch(tokens, tokens.roll(-1, 1), every, torch.arange(task.length).expand(shape), every.long())


def constant(name: str, box: Box) -> Tensor:
    """Weights whose values do not matter; drawing them would take most of the time."""
    return torch.full([length for _, length in box], 0.01)


Words = Callable[[ModelConfig], dict[str, Any]]  # more words of `build_engine` for a model


def all_learns(model: ModelConfig) -> dict[str, Any]:
    """No more words."""
    return {}


def train(runtime: Runtime, parallel: ParallelConfig, task: Task, words: Words) -> None:
    """Build an engine and take the steps."""
    engine = build_engine(
        task.model,
        runtime=runtime,
        parallel=parallel,
        config=EngineConfig(precision=task.precision),
        micro_size=task.rows,
        optim=OptimConfig(),
        total_steps=100,
        weights=constant,
        **words(task.model),
    )
    for step in range(task.steps):
        engine.forward_backward(packed(task, step), token_loss)
        engine.step()


def peak(runtime: Runtime, parallel: ParallelConfig, task: Task, words: Words = all_learns) -> int:
    """Bytes that this rank's resident memory grew by at most."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    train(runtime, parallel, replace(task, width=64, layers=8, length=16, rows=1, vocabulary=64), words)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    train(runtime, parallel, task, words)
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most since the record was set back."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def find(name: str, task: Task, timeout_s: float = 1200.0) -> Finding:
    """One layout, measured."""
    ranks, parallel = LAYOUTS[name]
    numbers = Numbers(MASTER[task.precision].itemsize, COMPUTE[task.precision].itemsize)
    formula = fullest(task.model, task.batch, parallel, ranks, numbers)
    peaks = run_ranks(peak, ranks, parallel, task, timeout_s=timeout_s, deadline_s=timeout_s)
    return Finding(name, ranks, formula, max(peaks))


def row(found: Finding) -> str:
    """Of the table, in MiB."""
    formula = found.formula
    passing = (formula.gathered, formula.activations, formula.update)
    cells = [f"{size / MIB:,.0f}" for size in (formula.states, *passing, formula.total, found.measured)]
    return f"| {' | '.join([found.layout, str(found.ranks), *cells, f'{found.ratio:.2f}'])} |"


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    sizes = {"width": 512, "layers": 6, "vocabulary": 8192, "rows": 4, "length": 128, "micros": 3, "steps": 3}
    words = options(__doc__ or "", argv, **sizes, bf16=0)
    task = Task(*(getattr(words, name) for name in sizes), Precision.BF16 if words.bf16 else Precision.FP32)
    facts: dict[str, Any] = {name: getattr(words, name) for name in sizes}
    facts |= {"parameters": f"{num_parameters(task.model):,}", "precision": task.precision.value, **machine()}
    print(f"\n### Memory\n\n{', '.join(f'{name} {value}' for name, value in facts.items())}. In MiB.\n")
    columns = ["layout", "ranks", "states", "gathered", "activations", "or update", "formula", "measured", "ratio"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    findings = []
    for name in LAYOUTS:
        findings.append(find(name, task))
        print(row(findings[-1]), flush=True)
    if words.out is not None:
        content = json.loads(words.out.read_text()) if words.out.exists() else {}
        content["Memory"] = {"facts": facts, "layouts": [asdict(found) for found in findings]}
        words.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
