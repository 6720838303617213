"""`framework explain STAGE WORDS...`: the resolved recipe, the batch arithmetic and the memory; nothing is started."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from framework.core.errors import UsageError
from framework.engine.config import Precision
from framework.planning.memory import num_parameters, state_memory
from framework.stages.config import PpoRun, RunConfig, TrainingRun

Compose = Callable[[str, Sequence[str]], tuple[RunConfig, ...]]


def explain(words: list[str], compose: Compose) -> int:
    """Print what `framework WORDS...` would do."""
    if not words:
        raise UsageError("explain takes the words of a stage: framework explain sft init_from=... data.train=[...]")
    for config in compose(words[0], words[1:]):
        print(f"# {config.stage}: {config.run.dir}")
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True), end="")
        for line in [*_batch_lines(config), *_memory_lines(config)]:
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
        micro = config.batch.micro(1)
        rows, width = config.batch.size, config.data.max_tokens
        return [
            f"one optimizer step = {rows} sequences x {width} tokens = {rows * width:,} tokens at most",
            f"on one data rank: {rows // micro} micro-batches of {micro} sequences",
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


def _memory_lines(config: RunConfig) -> list[str]:
    if not isinstance(config, TrainingRun) or config.init_from:
        return []
    model, note = config.model, ""
    if not model.vocab_size:
        vocabulary = Path(config.tokenizer, "tokenizer.json")
        if not vocabulary.exists():
            return ["memory: known once the tokenizer is there (model.vocab_size comes from it)"]
        model, note = replace(model, vocab_size=_vocabulary_size(vocabulary)), ", vocabulary from the tokenizer"
    parameters = num_parameters(model)
    memory = state_memory(parameters, 8 if config.engine.precision is Precision.FP64 else 4, num_shards=1)
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    states = " + ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
    return [
        f"{parameters:,} parameters{note}",
        f"states on one rank: {states} = {memory.total / 2**20:,.1f} MiB (activations not counted)",
    ]


def _vocabulary_size(path: Path) -> int:
    from tokenizers import Tokenizer

    size: int = Tokenizer.from_file(str(path)).get_vocab_size()
    return size
