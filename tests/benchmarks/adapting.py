"""What learning less saves: a whole model, the last half of its layers, the last one, an adapter; the same engine and
rows, a Llama on one process.

Speed by turns, as ever; the rivals are what learns less, so a factor below 1 says how much faster they are. Beside it
the peak of resident memory above what was there before the model (`memory` says how that is taken), and the bytes of
AdamW's moments.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from framework.core import runtime
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig
from framework.models.config import LoraConfig, ModelConfig
from framework.models.frozen import frozen_names
from framework.models.init import parameter_shapes, random_weights
from framework.models.lora import still, with_fresh
from framework.optim.config import OptimConfig, Schedule
from framework.parallel.config import ParallelConfig
from framework.stages.pretrain import token_loss
from tests.benchmarks import memory
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.distributed import run_ranks

LORA = LoraConfig(rank=8)
WAYS = ("everything", "the last half of the layers", "the last layer", "an adapter, rank 8")


def words(model: ModelConfig, way: str) -> dict[str, Any]:
    """Of `build_engine`."""
    if way.startswith("an adapter"):
        return {"frozen": still(model, LORA), "lora": LORA}
    layers = {"the last layer": 1, "the last half of the layers": model.num_layers // 2}.get(way, 0)
    return {"frozen": frozen_names(parameter_shapes(model), [], layers, model.num_layers)}


def run(place: Path, laps: Laps, task: memory.Task, way: str, threads: int) -> None:
    """A lap is one step."""
    runtime.start("cpu", threads)
    engine = build_engine(
        task.model,
        runtime=Runtime(),
        parallel=ParallelConfig(),
        config=EngineConfig(),
        micro_size=task.rows,
        optim=OptimConfig(schedule=Schedule.CONSTANT, warmup=0),
        total_steps=1,
        weights=with_fresh(random_weights(task.model, seed=0), task.model, LORA, seed=0),
        **words(task.model, way),
    )
    rows = memory.packed(task, 0)
    total, weight = engine.measure(rows, token_loss)["loss"]
    laps.ready({}, {"loss before": float(total / weight)})
    step = 0
    while True:
        step += 1
        rows = memory.packed(task, step)
        engine.forward_backward(rows, token_loss)
        engine.step()
        laps.done(rows.tokens.numel(), 0)


def peak(task: memory.Task, way: str) -> int:
    """Bytes that a process grew by at most."""
    (found,) = run_ranks(memory.peak, 1, ParallelConfig(), task, functools.partial(words, way=way), timeout_s=600)
    return int(found)


def moments(task: memory.Task, way: str) -> int:
    """Bytes of AdamW's states."""
    engine = build_engine(
        task.model,
        runtime=Runtime(),
        parallel=ParallelConfig(),
        config=EngineConfig(),
        micro_size=1,
        optim=OptimConfig(),
        total_steps=1,
        weights=memory.constant,
        **words(task.model, way),
    )
    return sum(x.nbytes for name, _, x in engine.shards() if name.startswith("optim/exp_avg"))


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    sizes = {"width": 512, "layers": 6, "vocabulary": 8192, "rows": 4, "length": 128, "micros": 1, "steps": 3}
    args = options(__doc__ or "", argv, rounds=12, **sizes, threads=1)
    task = memory.Task(*(getattr(args, name) for name in sizes))
    facts = {name: getattr(args, name) for name in sizes if name != "steps"}
    contestants: dict[str, Run] = {
        way: functools.partial(run, task=task, way=way, threads=args.threads) for way in WAYS
    }
    with tempfile.TemporaryDirectory() as scratch:
        report("Learning less", compete(contestants, Path(scratch), args.rounds), facts, args.out, unit="tokens")
    # All peaks first: ranks are forks, and what this process has freed would lie there for them to use.
    peaks = {way: peak(task, way) for way in WAYS}
    found = {way: {"peak": peaks[way], "moments": moments(task, way)} for way in WAYS}
    print("\n| what learns | peak memory, MiB | AdamW's moments, MiB |\n|---|---|---|")
    for way, sizes_of in found.items():
        print(f"| {way} | {sizes_of['peak'] / memory.MIB:,.0f} | {sizes_of['moments'] / memory.MIB:,.1f} |")
    if args.out is not None:
        content = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(content | {"Memory of learning less": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
