"""All layouts of some ranks, what each is asked to compute, and how far its answer is from one process's.

A layout is a choice of axis sizes whose product is the world, with the ways that an axis has. Model and rows are
awkward on purpose: 37 tokens, grouped heads of a size that is not hidden / heads, tied embeddings, biases, an odd inner
size, rows of 13 places with two documents and padding, and last rows of which no label counts, so that a data rank has
nothing to learn from.
Left out: what must hold (`test_lattice`), and the page that says what came out (`layout_page`).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.manager import CheckpointManager
from framework.core.errors import UsageError
from framework.core.records import Counts, Experience, Metrics, PreferenceBatch, Rows, Scores, TokenBatch
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig, Precision
from framework.engine.metrics import means
from framework.engine.plan import check
from framework.engine.protocol import Engine, Piece, StepReport
from framework.models.config import Activation, Bias, ModelConfig
from framework.models.init import random_weights
from framework.optim.config import OptimConfig, Schedule
from framework.parallel import config as layouts
from framework.parallel.config import ContextForm, ParallelConfig
from framework.workers.actor import TokenPolicyLoss
from framework.workers.config import PpoConfig
from tests.engine.cases import language_loss, packed, ranking_loss, rollout, value_loss

MODEL = ModelConfig(
    vocab_size=37,
    hidden_size=20,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=22,
    activation=Activation.SWIGLU,
    attention_bias=Bias.ALL,
    mlp_bias=True,
)
OPTIM = OptimConfig(lr=0.01, eps=1e-5, schedule=Schedule.COSINE, warmup=0.1, clip=1.0)
STEPS, ROWS, PLACES, MICRO = 5, 8, 13, 4
_REPLICATED = "replicate"
AXES = (_REPLICATED, "shard", "context", "tensor", "pipeline")


@dataclass(frozen=True)
class Layout:
    """One row of the table. Example: Layout(4, ParallelConfig("shard 2 x tensor 2", shard=2, tensor=2))."""

    world: int
    parallel: ParallelConfig

    @property
    def name(self) -> str:
        return self.parallel.name


@dataclass(frozen=True)
class Update:
    """One thing to train."""

    rows: Callable[[int], Rows]
    loss_fn: Callable[..., tuple[Tensor, Metrics]]
    heads: dict[str, Any] = field(default_factory=dict)


def narrow(rows: TokenBatch, trained: int) -> TokenBatch:
    """13 places a row, and of the last rows no label."""
    rows = rows._map(lambda x: x[:, :PLACES])
    counts = (torch.arange(len(rows)) < trained).unsqueeze(1)
    return replace(rows, loss_mask=rows.loss_mask & counts)


def pretraining(step: int) -> TokenBatch:
    return narrow(packed(ROWS, step), ROWS - 2)


def answers(step: int) -> TokenBatch:
    """As in SFT: few labels count."""
    return narrow(packed(ROWS, step, trained=0.2), ROWS - 2)


def pairs(step: int) -> PreferenceBatch:
    chosen, rejected = (narrow(rollout(ROWS, seed).inputs(), ROWS) for seed in (step, step + 1000))
    return PreferenceBatch(chosen=chosen, rejected=rejected)


def experience(step: int) -> Experience:
    random = torch.Generator().manual_seed(step)
    drawn = rollout(ROWS, step)._map(lambda x: x[:, :PLACES] if x.ndim == 2 else x)
    mask = drawn.response_mask

    def noise(scale: float, base: float = 0.0) -> Tensor:
        return (base + scale * torch.randn(mask.shape, generator=random, dtype=torch.float64)) * mask

    old, values = noise(0.2, -3.6), noise(0.5)
    return Experience(drawn, old, old + noise(0.1), values, noise(0.1), noise(1.0), values + noise(0.3))


@dataclass(frozen=True)
class Clipped:
    """The actor's own loss; a class, so that ranks can be handed it."""

    needs_entropy = pointwise = True

    def __call__(self, log_probs: Tensor, entropy: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        assert isinstance(rows, Experience)
        return TokenPolicyLoss(PpoConfig(entropy_coefficient=0.01))(log_probs, entropy, rows, counts)


def token_loss(log_probs: Tensor, entropy: Tensor | None, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    return language_loss(Scores(log_probs=log_probs), rows, counts)


token_loss.pointwise = True  # type: ignore[attr-defined]

Question = tuple[str, Precision]  # an update by name, and what it computes with
PRETRAINING = "pretraining"
UPDATES = {
    PRETRAINING: Update(pretraining, token_loss),
    "sft": Update(answers, token_loss),
    "reward model": Update(pairs, ranking_loss, {"num_classes": 1}),
    "actor": Update(experience, Clipped()),
    "critic": Update(experience, value_loss, {"value_head": True}),
}


# --- which layouts there are ------------------------------------------------------------------------------------------


def lattice(world: int) -> list[Layout]:
    """Every layout of exactly `world` ranks that the model fits, in one order."""
    found = [layout for sizes in factors(world, len(AXES)) for layout in ways(dict(zip(AXES, sizes)))]
    return [layout for layout in found if not refusal(layout)]


def refused(world: int) -> list[tuple[Layout, str]]:
    """Those that it does not fit, and the line that says so."""
    found = [layout for sizes in factors(world, len(AXES)) for layout in ways(dict(zip(AXES, sizes)))]
    return [(layout, line) for layout in found if (line := refusal(layout))]


def refusal(layout: Layout) -> str:
    try:
        check(MODEL, layout.parallel, EngineConfig(), layout.world)
    except UsageError as error:
        return str(error)
    return ""


def factors(product: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `product` as `count` ordered factors."""
    for sizes in itertools.product(range(1, product + 1), repeat=count):
        if torch.tensor(sizes).prod().item() == product:
            yield sizes


def ways(sizes: dict[str, int]) -> Iterator[Layout]:
    """The layouts of some axis sizes: each way of each axis that is there. Where context ranks stand alone, they either
    replicate or share out the parameters; beside sharding data ranks they share them out."""
    forms = list(ContextForm) if sizes["context"] > 1 else [ContextForm.RING]
    schedules = list(layouts.Schedule) if sizes["pipeline"] > 1 else [layouts.Schedule.ONE_F_ONE_B]
    alone = sizes["context"] > 1 and sizes["shard"] == 1
    for form, schedule, shard in itertools.product(forms, schedules, (1, 0) if alone else (sizes["shard"],)):
        if alone and shard == 0 and sizes[_REPLICATED] > 1:
            continue  # 0 would share out over the replicas too
        words = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
        if sizes["context"] > 1:
            words = [f"{word} {form.value}" if "context" in word else word for word in words]
            words += ["sharing parameters"] if alone and shard == 0 else []
        if sizes["pipeline"] > 1:
            words = [f"{word} {schedule.value}" if "pipeline" in word else word for word in words]
        rest = {axis: sizes[axis] for axis in ("context", "tensor", "pipeline")}
        world = 1
        for size in sizes.values():
            world *= size
        yield Layout(world, ParallelConfig(", ".join(words), shard, context_form=form, schedule=schedule, **rest))


def zero_lattice(world: int) -> list[Layout]:
    """DeepSpeed's."""
    stages = [ParallelConfig(f"zero{stage}", zero=stage) for stage in (1, 2, 3)]
    return [Layout(world, parallel) for parallel in (*stages, ParallelConfig("zero3_offload", zero=3, offload=True))]


def questions(index: int) -> list[Question]:
    """What the layout of this number is asked in CI: pretraining in every precision, and in turn one other update.
    DeepSpeed's masters are fp32 whatever computes."""
    others = [name for name in UPDATES if name != PRETRAINING]
    other = others[index % len(others)]
    if index < len(LAYOUTS):
        return [*((PRETRAINING, precision) for precision in Precision), (other, Precision.FP64)]
    return [(PRETRAINING, Precision.FP32), (PRETRAINING, Precision.BF16), (other, Precision.FP32)]


WORLDS = (2, 3, 4)
LAYOUTS = [layout for world in WORLDS for layout in lattice(world)]
ZERO = [layout for world in (2, 4) for layout in zero_lattice(world)]


# --- what a layout computes -------------------------------------------------------------------------------------------


Held = list[Piece]  # copies


@dataclass(frozen=True)
class Course:
    """What one process saw of some steps. DeepSpeed's gradients can be had of the first step alone."""

    start: Held
    losses: list[float]
    gradients: list[Held]
    weights: Held


@dataclass(frozen=True)
class Deviation:
    """From one process's answer, by the measure of law Layout."""

    loss: float  # of all steps
    gradient: float  # of the first step
    after: float  # later gradients and the weights at the end: they follow an AdamW step
    start: bool = True  # the first weights have the same bits


@dataclass(frozen=True)
class Found:
    """What a rank of a layout found of its own parts."""

    deviations: dict[Question, Deviation]
    collectives: int  # of one step of pretraining
    bytes: int  # handed to them
    hashes: dict[str, str]  # of a checkpoint of one process, read and written again


def engine_of(
    layout: Layout, runtime: Runtime, update: Update, precision: Precision, model: ModelConfig = MODEL
) -> Engine:
    return build_engine(
        model,
        runtime=runtime,
        parallel=layout.parallel,
        config=EngineConfig(precision=precision),
        micro_size=MICRO,
        optim=OPTIM,
        total_steps=20,
        weights=random_weights(model, seed=7),
        **update.heads,
    )


def share(rows: Rows, engine: Engine) -> Rows:
    """This data rank's rows, as even as can be; the rows of rank 3 of 4 have no label that counts."""
    return rows.select(torch.arange(len(rows)).tensor_split(engine.data_size)[engine.data_rank])


def train(engine: Engine, update: Update, steps: int = STEPS) -> tuple[Course, "Traffic"]:
    """Some steps: this rank's parts, and what the last step sent."""
    start, losses, gradients = copies(engine.pieces()), [], []
    for step in range(steps):
        with Traffic() as seen:
            figures = means(engine.forward_backward(share(update.rows(step), engine), update.loss_fn))
        losses.append(figures.get("loss", next(iter(figures.values()))))
        gradients.append(copies(engine.pieces(gradients=True)))
        with seen:
            report = engine.step()
        if step == 0:
            gradients[0] = gradients[0] or from_moments(engine, report)
    return Course(start, losses, gradients, copies(engine.pieces())), seen


def copies(pieces: Iterable[Piece]) -> Held:
    return [replace(piece, tensor=piece.tensor.clone()) for piece in pieces]


def from_moments(engine: Engine, report: StepReport) -> Held:
    """The gradient of the first step: Adam's first moment is (1 - beta1) times what clipping has left of it."""
    factor = (1 - OPTIM.beta1) * min(1.0, OPTIM.clip / (report.grad_norm + 1e-6))
    kind = "optim/exp_avg/"
    moments = ((name.removeprefix(kind), box, x) for name, box, x in engine.shards() if name.startswith(kind))
    return [Piece(name, (), box, moment.clone() / factor, True) for name, box, moment in moments]


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank hands to them. Barriers and the like carry nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func._opname.startswith(("recv", "wait", "barrier")):
            given = args[1] if len(args) > 1 and _holds_tensors(args[1]) else args[0]
            self.count += 1
            self.bytes += sum(x.numel() * x.element_size() for x in torch.utils._pytree.tree_leaves(given) if _is(x))
        return func(*args, **(kwargs or {}))


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _holds_tensors(value: Any) -> bool:
    return any(_is(x) for x in torch.utils._pytree.tree_leaves(value))


def rewritten(engine: Engine, layout: Layout, runtime: Runtime, folder: Path) -> dict[str, str]:
    """Read the checkpoint that one process has written, write it from here: the hash of each tensor."""
    ranks = runtime.rank, runtime.world_size
    saved = CheckpointManager(folder / "one", CheckpointConfig(), *ranks).latest()
    assert saved is not None
    engine.load_shards(saved.reader("trainer"))
    manager = CheckpointManager(folder / layout.name.replace(" ", "_"), CheckpointConfig(), *ranks)
    return manager.save(STEPS, {"trainer": engine.shards()}, {}).hashes("trainer")


def visit(runtime: Runtime, layout: Layout, one: Mapping[Question, Course], folder: Path) -> Found:
    """All that a rank is asked: each of the questions that `one` process has answered."""
    deviations, hashes, sent = {}, {}, Traffic()
    for (name, precision), answer in one.items():
        engine = engine_of(layout, runtime, UPDATES[name], precision)
        mine, seen = train(engine, UPDATES[name])
        deviations[name, precision] = compare(mine, answer)
        if (name, precision) == (PRETRAINING, Precision.FP32):
            sent, hashes = seen, rewritten(engine, layout, runtime, folder)
    return Found(deviations, sent.count, sent.bytes, hashes)


def save_one(folder: Path) -> dict[str, str]:
    """A checkpoint of one process after some steps; the hash of each tensor."""
    update = UPDATES[PRETRAINING]
    engine = engine_of(Layout(1, ParallelConfig()), Runtime(), update, Precision.FP32)
    for step in range(3):
        engine.forward_backward(update.rows(step), update.loss_fn)
        engine.step()
    manager = CheckpointManager(folder / "one", CheckpointConfig(), 0, 1)
    return manager.save(3, {"trainer": engine.shards()}, {}).hashes("trainer")


# --- the measure ------------------------------------------------------------------------------------------------------


def bound(precision: Precision) -> float:
    """What the first gradient may deviate. fp64: law Layout's figure. fp32 and bf16 by an error model: a gradient is a
    sum of products over all trained tokens whose order the layout changes; each of some three dozen roundings a layer
    before it shows up once; errors add like a random walk. AdamW divides by |g| + 1e-5: where a gradient is nearly zero
    its error is a hundredfold in the weight, and later gradients follow the weights. In bf16 that leaves nothing to say
    of them, and only losses are held (to 5e-3)."""
    unit = {Precision.FP32: 2.0**-24, Precision.BF16: 2.0**-9}
    if precision is Precision.FP64:
        return 1e-10
    return unit[precision] * 4 * (ROWS * PLACES + 32 * MODEL.num_layers) ** 0.5


def compare(mine: Course, one: Course) -> Deviation:
    """This rank's parts beside the same boxes of the whole."""
    losses = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(mine.losses, one.losses, strict=True))
    first, *later = (apart(a, b) for a, b in zip(mine.gradients, one.gradients, strict=True))
    whole = {piece.name: piece.tensor for piece in one.start}
    start = all(torch.equal(part.tensor, boxed(part, whole)) for part in mine.start)
    return Deviation(losses, first, max(*later, apart(mine.weights, one.weights)), start)


def apart(mine: Held, one: Held) -> float:
    """The largest max|Δ| / max(max|x|, RMS of all) over tensors x of `one` process, as far as this rank holds them."""
    whole = {piece.name: piece.tensor for piece in one}
    rms = float(torch.cat([x.double().flatten() for x in whole.values()]).square().mean().sqrt())
    far = 0.0
    for part in (part for part in mine if part.tensor.numel()):
        gap = (part.tensor.double() - boxed(part, whole).double()).abs().max()
        far = max(far, float(gap) / max(float(whole[part.name].abs().max()), rms))
    return far


def boxed(part: Piece, whole: Mapping[str, Tensor]) -> Tensor:
    return whole[part.name][tuple(slice(offset, offset + length) for offset, length in part.box)]


def worst(found: Sequence[Found], question: Question) -> Deviation:
    """Of all ranks."""
    each = [rank.deviations[question] for rank in found]
    loss, gradient, after = (max(getattr(d, name) for d in each) for name in ("loss", "gradient", "after"))
    return Deviation(loss, gradient, after, all(d.start for d in each))


def alone(name: str, precision: Precision) -> Course:
    """One process's answer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        update = UPDATES[name]
        return train(engine_of(Layout(1, ParallelConfig()), Runtime(), update, precision), update)[0]
    finally:
        torch.set_num_threads(before)
