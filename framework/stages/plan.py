"""`framework explain STAGE WORDS...`: the resolved recipe, the batch arithmetic and the memory; nothing is started."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from cuda_ext import dispatch
from framework.core.errors import UsageError
from framework.core.places import local
from framework.engine.config import Precision
from framework.models.config import Architecture, ModelConfig
from framework.planning.memory import Batch, Numbers, fullest
from framework.planning.parameters import num_parameters
from framework.stages.config import ClassifyRun, PpoRun, PreferenceRun, RewardModelRun, RunConfig, SftRun, TrainingRun
from framework.stages.ops import ops_lines, wanted_ops

Compose = Callable[[str, Sequence[str]], tuple[RunConfig, ...]]


def explain(words: list[str], compose: Compose) -> int:
    """Print what `framework WORDS...` would do."""
    if not words:
        raise UsageError("explain takes the words of a stage: framework explain sft init_from=... data.train=[...]")
    for config in compose(words[0], words[1:]):
        print(f"# {config.stage}: {config.run.dir}")
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True), end="")
        for line in [*_batch_lines(config), *_memory_lines(config), *ops_lines(config)]:
            print(f"# {line}")
        print()
    return 0


def plain(config: Any) -> dict[str, Any]:
    """A config as YAML and JSON can hold it: nested dicts, choices by value."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: simple(inner) for name, inner in value.items()}
        return value.value if isinstance(value, Enum) else value

    result: dict[str, Any] = simple(asdict(config))
    return result


def _batch_lines(config: RunConfig) -> list[str]:
    if isinstance(config, TrainingRun):
        rows, width = config.batch.size, config.data.max_tokens
        return [
            f"one optimizer step = {rows} sequences x {width} tokens = {rows * width:,} tokens at most",
            *_mix_lines(config),
            _share_line(config),
        ]
    if isinstance(config, PpoRun):
        responses = config.rollout.prompts * config.rollout.samples
        steps = responses // config.batch.size * config.ppo.epochs
        return [
            f"one iteration = {config.rollout.prompts} prompts x {config.rollout.samples} samples "
            f"= {responses} responses",
            f"updated in {steps} optimizer steps of {config.batch.size} responses ({config.ppo.epochs} epochs)",
            f"a row is {config.width} tokens wide",
        ]
    return []


def _mix_lines(config: TrainingRun) -> list[str]:
    if not (isinstance(config, SftRun) and config.mix.train and config.mix.coefficient):
        return []
    rows, width = config.mix.size or config.batch.size, config.data.max_tokens
    return [f"and {rows} rows of text x {width} tokens, whose loss counts {config.mix.coefficient:g}"]


def _share_line(config: TrainingRun) -> str:
    try:
        data_ranks = config.parallel.data_size(_ranks(config))
        micro = config.batch.micro(data_ranks)
    except UsageError as error:  # a layout that needs other ranks, or another batch
        return f"on one data rank: {error}"
    return f"on one data rank: {config.batch.size // data_ranks // micro} micro-batches of {micro} sequences"


def _ranks(config: TrainingRun) -> int:
    return config.cluster.workers if isinstance(config.cluster.workers, int) else 1


def _memory_lines(config: RunConfig) -> list[str]:
    if not isinstance(config, TrainingRun):
        return []
    model = _model(config)
    if model is None:
        return ["memory: known once the tokenizer, or the model of init_from, is there"]
    from framework.engine.plan import check  # torch
    from framework.stages.learning import num_learning

    ranks = _ranks(config)
    try:
        check(model, config.parallel, config.engine, ranks, config.lora)
        memory = fullest(model, _load(config, ranks, model), config.parallel, ranks, _numbers(config))
        learning, everything = num_learning(config, model)
        memory = memory.learning(learning / everything)
    except UsageError as error:  # a layout that needs other ranks, another model or batch
        return [f"memory: {error}"]
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    states = " + ".join(f"{name} {_mib(size)}" for name, size in parts.items())
    beside = f"gathered or cast {_mib(memory.gathered)} + activations {_mib(memory.activations)}"
    beside += f", or an update's own {_mib(memory.update)}"
    where = f"parallel={config.parallel.name}, {ranks} rank{'s' if ranks > 1 else ''}"
    learn = "" if learning == everything else f", {learning:,} of them learn"
    return [
        f"{num_parameters(model):,} parameters{learn}; the fullest rank under {where} holds",
        f"states: {states} = {_mib(memory.states)}",
        f"in turn: {beside}; {_mib(memory.total)} at the fullest instant",
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


_NUMBERS = {Precision.FP32: Numbers(4, 4), Precision.BF16: Numbers(4, 2), Precision.FP64: Numbers(8, 8)}


def _numbers(config: TrainingRun) -> Numbers:
    """Kernels count where they would run on this machine's own card."""
    numbers = _NUMBERS[config.engine.precision]
    if config.device == "cpu" or config.engine.strict or config.engine.precision is Precision.FP64:
        return numbers
    with dispatch.preferring(**wanted_ops(config)):
        kernel, norm = (dispatch.explained(op).fused for op in ("linear_log_probs", "rms_norm"))
    return replace(numbers, kernel=kernel, fused_norms=norm)


def _without_mask(config: TrainingRun, model: ModelConfig, ranks: int) -> bool:
    """Whether attention on this machine's own card keeps packed documents apart by itself."""
    import torch

    from cuda_ext.attention.op import takes_documents

    half = config.engine.precision is Precision.BF16 and not config.engine.strict
    masked = model.position.adds_to_scores or model.architecture is Architecture.PREFIX
    masked = masked or config.parallel.sizes(ranks)["context"] > 1  # which has cores of its own
    if config.device == "cpu" or masked or not half or not torch.accelerator.is_available():
        return False
    with dispatch.preferring(**wanted_ops(config)):
        return takes_documents(torch.device("cuda", 0), torch.bfloat16, model.head_size, model.score_cap)


def _model(config: TrainingRun) -> ModelConfig | None:
    """The architecture that the run will have; None where it is not yet known."""
    if config.init_from:
        place = local(config.init_from)
        if not any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            return None
        from framework.models.hub import read_architecture  # torch

        return read_architecture(local(config.init_from))[0]
    vocabulary = Path(config.tokenizer, "tokenizer.json")
    if config.model.vocab_size or not vocabulary.exists():
        return config.model if config.model.vocab_size else None
    return replace(config.model, vocab_size=_vocabulary_size(vocabulary))


def _load(config: TrainingRun, ranks: int, model: ModelConfig) -> Batch:
    """One data rank's part of a step, every row full."""
    data_ranks = config.parallel.data_size(ranks)
    rows = config.batch.micro(data_ranks)
    micros = -(-config.batch.size // (rows * data_ranks))
    pairs, classes = isinstance(config, RewardModelRun | PreferenceRun), int(isinstance(config, RewardModelRun))
    if isinstance(config, ClassifyRun):  # how many the data will say; next to the model they are nothing
        classes = len(config.classify.labels) or 1
    packed = not (pairs or classes) and not _without_mask(config, model, ranks)
    return Batch(rows * (1 + pairs), config.data.max_tokens, micros, classes=classes, packed=packed)


def _vocabulary_size(path: Path) -> int:
    from tokenizers import Tokenizer

    size: int = Tokenizer.from_file(str(path)).get_vocab_size()
    return size
