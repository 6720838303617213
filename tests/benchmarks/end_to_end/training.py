"""Training: tokens a second, MFU in both conventions, and the most memory held beside what the planner says.

Through the real engine: bf16, rows of several documents each, AdamW. A micro-batch is the largest power of two of rows
that the planner says fits. Blocks are compiled, and once more they are not: it is the latter that the planner counts.
Left out: loading rows (`tests.benchmarks.step`), and more than one card.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from cuda_ext import library
from cuda_ext.attention.op import takes_documents
from framework.core import runtime
from framework.core.records import TokenBatch
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig, Precision
from framework.engine.flops import Work, utilisation
from framework.engine.metrics import means
from framework.engine.protocol import Engine
from framework.optim.config import OptimConfig
from framework.parallel.config import ParallelConfig
from framework.planning.memory import Batch, Numbers, RankMemory, fullest
from framework.stages.pretrain import token_loss
from tests.benchmarks.end_to_end.card import Bench
from tests.benchmarks.end_to_end.llamas import VOCABULARY, llama, noise

DOCUMENTS = 4  # of a row, on average
WARM_UP = 3
_GIB = 2**30


@dataclass(frozen=True)
class Task:
    """A Llama, and a step of it. `goal`: MFU by the 6 N convention, of the card's peak by data sheet, in percent."""

    name: str
    rows: int
    length: int
    goal: float

    def planned(self, micro_size: int) -> RankMemory:
        """What the planner says of so many rows at once."""
        model = llama(self.name)
        card = torch.device("cuda", 0) if torch.accelerator.is_available() else torch.device("cpu")
        masked = not takes_documents(card, torch.bfloat16, model.head_size, model.score_cap)
        batch = Batch(micro_size, self.length, self.rows // micro_size, packed=masked)
        kernel = not library.why_not(0)
        bf16 = Numbers(master=4, compute=2, kernel=kernel, fused_norms=kernel)
        return fullest(model, batch, ParallelConfig(), 1, bf16)


TASKS = (Task("124m", 64, 2048, 45.0), Task("350m", 64, 2048, 50.0), Task("1b", 64, 2048, 53.0))
TINY = (Task("tiny", 4, 64, 45.0),)


@dataclass(frozen=True)
class Measured:
    """What some steps took. `peak`: the most bytes held during them, None where nobody counts."""

    seconds: list[float]
    work: Work  # of one step, the mean
    losses: list[float]  # of the steps before, which warmed up
    peak: int | None


def run(bench: Bench, task: Task) -> None:
    """A line compiled, a line not."""
    if not most_rows(task, bench.room()):
        print(f"training {task.name}: left out, not one row of {task.length} fits into {bench.room() / _GIB:.1f} GiB")
        return
    first = []
    for side in ("compiled", "not compiled") if bench.is_card else ("not compiled",):
        micro_size, measured = largest(bench, task, compiled=side == "compiled")
        first.append(measured.losses[0])
        case = f"{task.name}, {task.rows} x {task.length} tokens"
        figures = rates(bench, measured) | {"goal, %": task.goal, "rows at once": float(micro_size)}
        figures |= held(measured.peak, task.planned(micro_size))
        bench.add("training", case, side, measured.work.tokens, "tokens", measured.seconds, figures)
    assert max(first) < 1.02 * min(first), f"{task.name} says another first loss once it is compiled: {first}"


def largest(bench: Bench, task: Task, compiled: bool) -> tuple[int, Measured]:
    """Measured with as many rows at once as the planner says fit; with half of them where it is wrong."""
    micro_size = most_rows(task, bench.room())
    while True:
        try:
            return micro_size, measure(bench, task, micro_size, compiled)
        except torch.OutOfMemoryError:
            if micro_size == 1:
                raise
        print(f"training {task.name}: {micro_size} rows at once do not fit, as the planner said they would")
        micro_size //= 2


def most_rows(task: Task, room: int) -> int:
    """The largest power of two of rows, at most a step's, that fits into `room` bytes by the planner; 0: not one."""
    fits = 0
    for power in range(task.rows.bit_length()):
        if task.planned(1 << power).total <= room:
            fits = 1 << power
    return fits


def measure(bench: Bench, task: Task, micro_size: int, compiled: bool) -> Measured:
    """Some steps, and before them those that warm up."""
    bench.forget()
    bench.begin_record()
    before = runtime.peak_memory_bytes(bench.here.device)
    model = llama(task.name)
    engine = build_engine(
        model,
        runtime=bench.here,
        parallel=ParallelConfig(),
        config=EngineConfig(precision=Precision.BF16, compile=compiled),
        micro_size=micro_size,
        optim=OptimConfig(),
        total_steps=1000,
        weights=noise,
    )
    batches = list(islice(stream(task), WARM_UP + bench.laps))
    losses = [step(engine, rows)[0] for rows in batches[:WARM_UP]]
    bench.begin_record()
    done: list[Work] = []
    seconds = [bench.seconds(lambda rows=rows: done.append(step(engine, rows)[1])) for rows in batches[WARM_UP:]]
    peak = runtime.peak_memory_bytes(bench.here.device)
    work = Work(*(statistics.mean(getattr(each, name) for each in done) for name in ("tokens", "parameters", "exact")))
    return Measured(seconds, work, losses, None if peak is None or before is None else peak - before)


def step(engine: Engine, rows: TokenBatch) -> tuple[float, Work]:
    """(loss, work) of one optimizer step."""
    loss = means(engine.forward_backward(rows, token_loss))["loss"]
    return loss, engine.step().work


def stream(task: Task) -> Iterator[TokenBatch]:
    """Rows packed with documents of random lengths and tokens; every label counts."""
    generator = torch.Generator().manual_seed(0)
    shape = (task.rows, task.length)
    place = torch.arange(task.length).expand(shape)
    while True:
        tokens = torch.randint(VOCABULARY[task.name], shape, generator=generator)
        begins = torch.rand(shape, generator=generator) * task.length < DOCUMENTS
        begins[:, 0] = True
        first = torch.where(begins, place, 0).cummax(1).values
        yield TokenBatch(tokens, tokens.roll(-1, 1), torch.ones_like(begins), place - first, begins.cumsum(1))


def rates(bench: Bench, measured: Measured) -> dict[str, float]:
    """MFU in percent by both conventions, of the peak by data sheet where the card is known, and of the card's own
    product."""
    seconds = statistics.median(measured.seconds)
    peaks = {"peak": runtime.peak_flops(bench.here.device), "own product": bench.product}
    counted = {"6 N": measured.work.parameters, "exact": measured.work.exact}
    return {
        f"MFU {convention}, % of {of}": 100 * utilisation(flops, seconds, peak)
        for of, peak in peaks.items()
        if peak
        for convention, flops in counted.items()
    }


def held(peak: int | None, memory: RankMemory) -> dict[str, float]:
    """The most memory held, beside the planner's word for it."""
    planned = {"GiB planned": memory.total / _GIB}
    return planned if peak is None else planned | {"GiB held": peak / _GIB, "% of planned": 100 * peak / memory.total}
