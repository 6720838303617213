"""What the training stages share: rows, model, engine, loop, export. A stage adds its rows and its loss."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.checkpoint.manager import CheckpointManager
from framework.core.config import require
from framework.core.deadline import deadline
from framework.core.errors import UsageError
from framework.core.places import local
from framework.core.records import Box, Metrics, ReadBox, Tokenizer
from framework.core.registry import lookup
from framework.core.runtime import peak_flops
from framework.data.config import DataConfig
from framework.data.loader import Loader, RowSource
from framework.engine.build import build_engine
from framework.engine.loop import Beside, train
from framework.engine.plan import check
from framework.engine.protocol import Engine
from framework.models.adapters import save_adapter
from framework.models.config import Architecture, LoraConfig, ModelConfig, Position
from framework.models.hub import pieces_of, read_folder, save_weights
from framework.models.init import head_shapes, parameter_shapes, random_weights
from framework.models.lora import merged, targets, with_fresh
from framework.stages.config import TrainingRun
from framework.stages.job import Job, Teller, located
from framework.stages.learning import frozen_of, num_learning
from framework.tokenization.load import load as load_tokenizer
from framework.tracking.progress import Progress

Figures = dict[str, float]
Describe = Callable[[Figures], dict[str, Any]]
Loss = Callable[..., tuple[Tensor, Metrics]]  # an engine's loss_fn, pointwise or not
OpenRows = Callable[[DataConfig, str, Tokenizer, Path, int, Callable[[int, int], None] | None], RowSource]


@dataclass(frozen=True)
class Rows:
    """The two parts of a stage's data. `valid` is None where the recipe names no validation data."""

    train: RowSource
    valid: RowSource | None


Ready = Callable[[Engine, Rows], Rows]


@dataclass(frozen=True)
class Mixed:
    """What is learned beside a stage's own rows: `size` rows a step of another kind, under a loss of their own."""

    rows: RowSource
    size: int
    loss_fn: Loss
    shape: Callable[[Any, Any], Any]


_WRITES = (Architecture.CAUSAL, Architecture.PREFIX)
_TRAINS = {  # a stage -> the architectures that can learn what it teaches
    "pretrain": tuple(Architecture),
    "sft": _WRITES,
    "preference": _WRITES,
    "classify": (*_WRITES, Architecture.ENCODER),
    "reward_model": (*_WRITES, Architecture.ENCODER),
}


@dataclass(frozen=True)
class Start:
    """Where training starts: an architecture, its weights, and the tokenizer that belongs to them."""

    model: ModelConfig
    weights: ReadBox
    tokenizer: Tokenizer
    frozen: frozenset[str] = frozenset()  # parameters that do not learn
    lora: LoraConfig | None = None


def open_start(config: TrainingRun, world_size: int) -> Start:
    """From a model folder, or from nothing with a tokenizer's vocabulary. Heads that a folder lacks are drawn. A model
    that does not fit the layout on `world_size` ranks is refused, and so is freezing what is not there."""
    tokenizer = load_tokenizer(config.init_from or config.tokenizer)
    if not config.init_from:
        model = replace(config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size)
        lookup("family", model.family).config_to(model)  # refuses now, not after training, what it could not save
        start = Start(model, random_weights(model, config.seed), tokenizer)
    else:
        model, stored, shapes = read_folder(config.init_from)
        refuse_other(config.model, model, config.init_from)
        model = balanced(model, config.model.moe.balance)
        start = Start(model, with_fresh_heads(stored, set(shapes), model, config.seed), tokenizer)
    if model.vocab_size < tokenizer.vocab_size:
        owner = "take the tokenizer that belongs to the model"
        raise UsageError(
            f"the tokenizer of {config.init_from or config.tokenizer} has {tokenizer.vocab_size} tokens, the model's "
            f"embedding only {model.vocab_size}; {owner if config.init_from else 'model.vocab_size=0 has as many rows'}"
        )
    if model.position is Position.LEARNED and config.data.max_tokens > model.max_positions:
        raise UsageError(
            f"data.max_tokens={config.data.max_tokens} is longer than the model's {model.max_positions} learned "
            f"positions; choose at most {model.max_positions}"
        )
    require(
        model.architecture in _TRAINS[config.stage],
        f"{config.stage} does not train a model of architecture={model.architecture}; it takes one of "
        f"{', '.join(map(str, _TRAINS[config.stage]))}",
    )
    check(start.model, config.parallel, config.engine, world_size, config.lora)
    if config.lora.rank:
        start = replace(start, weights=with_fresh(start.weights, model, config.lora, config.seed), lora=config.lora)
    return replace(start, frozen=frozen_of(config, model))


def balanced(model: ModelConfig, coefficient: float) -> ModelConfig:
    """How much experts are balanced is the training's: the recipe's word where it says one, else config.json's."""
    return replace(model, moe=replace(model.moe, balance=coefficient)) if coefficient and model.moe.experts else model


def refuse_other(given: ModelConfig, there: ModelConfig, folder: str) -> None:
    """The folder brings the architecture: what the recipe says of it (other than a default) must be the same."""
    default = ModelConfig()
    if there.moe.experts:
        given, there = (replace(x, moe=replace(x.moe, balance=0.0)) for x in (given, there))
    for name in (entry.name for entry in fields(ModelConfig)):
        asked, has = getattr(given, name), getattr(there, name)
        if asked not in (getattr(default, name), has):
            raise UsageError(
                f"model.{name}={asked}, but the model of init_from={folder} has {has}; leave model out, it is for "
                "training from nothing"
            )


def with_fresh_heads(stored: ReadBox, names: set[str], model: ModelConfig, seed: int) -> ReadBox:
    """`stored`, and initial values for what it does not hold."""
    fresh = random_weights(model, seed)

    def read(name: str, box: Box) -> Tensor:
        return stored(name, box) if name in names else fresh(name, box)

    return read


def open_both(job: Teller, config: TrainingRun, open_rows: OpenRows, tokenizer: Tokenizer) -> Rows:
    """Prepare (or find prepared) the rows of both parts, and say what was read."""
    data = located(config.data, job.say)

    def opened(part: str) -> RowSource:
        with job.preparing(part) as told:
            return open_rows(data, part, tokenizer, config.prepared, config.seed, told)

    rows = Rows(opened("train"), opened("valid") if data.valid else None)
    job.say(f"{len(rows.train):,} rows, {rows.train.num_tokens:,} trained tokens; the first sample:")
    job.say(rows.train.preview())
    for reason, number in rows.train.skipped.items():
        job.say(f"left out: {number:,} samples ({reason})")
    if len(rows.train) < config.batch.size:
        raise UsageError(
            f"data.train makes only {len(rows.train)} rows, fewer than batch.size={config.batch.size}; "
            f"choose a batch.size of at most {len(rows.train)}, or bring more data"
        )
    return rows


def fit(
    job: Job,
    config: TrainingRun,
    start: Start,
    rows: Rows,
    loss_fn: Loss,
    num_classes: int = 0,
    describe: Describe = lambda figures: {},
    shape: Callable[[Any, Any], Any] | None = None,
    ready: Ready = lambda engine, rows: rows,
    mixed: Mixed | None = None,
) -> Figures:
    """Train, export model/, and return the figures: after, and `.../before` at step 0. What `describe` makes of them
    goes into the model's config.json; `shape` is the loader's. `ready` may exchange the rows while the engine holds the
    starting weights, which it does at each attempt. `mixed` is learned beside the rows."""
    learning, everything = num_learning(config, start.model)
    if learning < everything:
        job.say(f"{learning:,} of {everything:,} parameters learn ({learning / everything:.1%})")
    total = config.train.total_steps(len(rows.train), config.batch.size)
    with deadline("building the model", patient=True):
        engine = build_engine(
            start.model,
            runtime=job.runtime,
            parallel=config.parallel,
            config=config.engine,
            micro_size=config.batch.micro(config.parallel.data_size(job.runtime.world_size)),
            optim=config.optim,
            total_steps=total,
            weights=start.weights,
            num_classes=num_classes,
            frozen=start.frozen,
            lora=start.lora,
            seed=config.seed,
        )

    def loader(source: RowSource, size: int = config.batch.size, shape: Any = shape) -> Loader:
        return Loader(source, size, config.seed, engine.data_rank, engine.data_size, shape)

    loader(rows.train).require(total)
    rows = ready(engine, rows)
    place = job.runtime
    peak = peak_flops(place.device)
    with Progress(config.stage, total=total, enabled=config.tracking.progress and place.is_main) as progress:
        outcome = train(
            engine,
            loader(rows.train),
            loss_fn,
            total_steps=total,
            manager=CheckpointManager(
                job.folder.checkpoints,
                config.checkpoint,
                place.rank,
                place.world_size,
                guard=job.folder.require_own,
            ),
            folder=job.folder,
            progress=progress,
            stop=job.stop,
            valid=loader(rows.valid) if rows.valid else None,
            beside=Beside(loader(mixed.rows, mixed.size, mixed.shape), mixed.loss_fn) if mixed else None,
            every=config.tracking.every,
            validate_every=config.train.validate_every,
            checkpoint_every=config.checkpoint.every,
            digest_every=config.tracking.digest_every,
            profile=config.folder / "profile" if config.train.profile else None,
            peak_flops=peak and peak * place.world_size,
        )
    export(engine, start, config, job, num_classes, _token_ids(start) | describe(outcome.figures))
    return {**outcome.figures, **{f"{name}/before": value for name, value in outcome.before.items()}}


def _token_ids(start: Start) -> dict[str, Any]:
    """What config.json says of the tokenizer."""
    ids = {"eos_token_id": start.tokenizer.end_id, "bos_token_id": start.tokenizer.bos_id}
    begun = dict.fromkeys(("decoder_start_token_id", "pad_token_id"), start.tokenizer.start_id)
    return ids | begun if start.model.encoder else ids


def export(
    engine: Engine, start: Start, config: TrainingRun, job: Job, num_classes: int, extra: Mapping[str, Any]
) -> None:
    """Write model/, with an adapter merged in, and adapter/ as PEFT has it. Gathering is collective; only the main rank
    writes."""
    weights = engine.weights()
    if not job.runtime.is_main:
        for _ in weights:
            pass
        return
    folder, low_rank, whole = config.folder / "model", dict[str, Tensor](), dict[str, Tensor]()
    if start.lora is not None:
        learned = parameter_shapes(start.model).keys() - start.frozen | head_shapes(start.model, 1).keys()
        weights = _noting(weights, learned, whole)
        weights = merged(weights, targets(start.model, start.lora), start.lora, low_rank)
    save_weights(start.model, weights, folder, classes=num_classes, extra=extra)
    start.tokenizer.save(str(folder))
    if start.lora is not None:
        _export_adapter(start, start.lora, config, job, low_rank, whole, num_classes)


def _noting(
    weights: Iterator[tuple[str, Tensor]], names: Collection[str], into: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if name in names:
            into[name] = tensor
        yield name, tensor


def _export_adapter(
    start: Start,
    lora: LoraConfig,
    config: TrainingRun,
    job: Job,
    low_rank: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    num_classes: int,
) -> None:
    folder, task = config.folder / "adapter", "SEQ_CLS" if num_classes else "CAUSAL_LM"
    place = local(config.init_from)
    base = str(place.absolute()) if place.is_dir() else config.init_from
    try:
        save_adapter(folder, base, lora, low_rank, whole, pieces_of(start.model, num_classes), task)
    except UsageError as error:
        job.say(f"adapter/ is not written: {error}; model/ holds the merged model")
        return
    start.tokenizer.save(str(folder))
