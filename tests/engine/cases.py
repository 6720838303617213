"""Tiny models of awkward sizes, rows of every kind, and the measure of law Layout: what the engine's tests share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from framework.core.records import Counts, Metrics, PreferenceBatch, Rollout, Rows, Scores, TokenBatch
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig
from framework.engine.torch_engine import TorchEngine
from framework.models.config import Bias, ModelConfig
from framework.models.init import random_weights
from framework.objectives.language import next_token_loss
from framework.objectives.preference import pairwise_ranking_loss
from framework.optim.config import OptimConfig, Schedule
from framework.parallel.config import ParallelConfig

VOCAB = 37  # divisible by nothing
TIED = ModelConfig(vocab_size=VOCAB, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=1, attention_bias=Bias.ALL)
UNTIED = ModelConfig(vocab_size=VOCAB, hidden_size=20, num_layers=1, num_heads=2, tied=False)
SINGLE, FSDP, DDP = ParallelConfig(), ParallelConfig("fsdp", shard=0), ParallelConfig("ddp")
OPTIM = OptimConfig(lr=0.01, eps=1e-5, schedule=Schedule.COSINE, warmup=0.1, clip=1.0)
WIDTH = 16


def build(
    runtime: Runtime | None = None,
    parallel: ParallelConfig = SINGLE,
    config: EngineConfig | None = None,
    model: ModelConfig = TIED,
    micro_size: int = 2,
    optim: OptimConfig | None = OPTIM,
    **heads: Any,
) -> TorchEngine:
    """An engine with fresh weights; `heads` are value_head, num_classes, temperature."""
    return build_engine(
        model,
        runtime=runtime or Runtime(),
        parallel=parallel,
        config=config or EngineConfig(),
        micro_size=micro_size,
        optim=optim,
        total_steps=20,
        weights=random_weights(model, seed=7),
        **heads,
    )


def packed(count: int, seed: int = 0, trained: float = 0.7) -> TokenBatch:
    """`count` rows, each of documents of 7 and 6 tokens and padding; a share of the labels counts."""
    random = torch.Generator().manual_seed(seed)
    shape = (count, WIDTH)
    ids = torch.tensor([1] * 7 + [2] * 6 + [0] * (WIDTH - 13)).repeat(count, 1)
    positions = torch.tensor([*range(7), *range(6), *[0] * (WIDTH - 13)]).repeat(count, 1)
    return TokenBatch(
        tokens=torch.randint(VOCAB, shape, generator=random) * (ids > 0),
        labels=torch.randint(VOCAB, shape, generator=random) * (ids > 0),
        loss_mask=(torch.rand(shape, generator=random) < trained) & (ids > 0),
        positions=positions,
        document_ids=ids,
    )


def padded(count: int, seed: int = 0) -> TokenBatch:
    """`count` rows of one document each, of unequal lengths."""
    return rollout(count, seed).inputs()


def pairs(count: int, seed: int = 0) -> PreferenceBatch:
    return PreferenceBatch(chosen=padded(count, seed), rejected=padded(count, seed + 1000))


def rollout(count: int, seed: int = 0) -> Rollout:
    """Prompts of 1 to 3 tokens, responses of at least one; `row` numbers the rows."""
    random = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 4, (count, 1), generator=random)
    lengths = torch.randint(4, WIDTH + 1, (count, 1), generator=random)
    places = torch.arange(WIDTH).expand(count, -1)
    mask = places < lengths
    return Rollout(
        tokens=torch.randint(VOCAB, (count, WIDTH), generator=random) * mask,
        token_mask=mask,
        response_mask=mask & (places >= prompts),
        positions=places * mask,
        log_probs=torch.zeros(count, WIDTH),
        policy_version=torch.zeros(count, WIDTH, dtype=torch.long),
        finished=torch.ones(count, dtype=torch.bool),
        row=torch.arange(count),
        sample=torch.zeros(count, dtype=torch.long),
    )


def language_loss(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    return next_token_loss(scores.log_probs, rows.inputs().loss_mask, counts.tokens)


def ranking_loss(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    assert scores.classes is not None
    chosen, rejected = scores.classes.squeeze(1).chunk(2)
    return pairwise_ranking_loss(chosen, rejected, counts.pairs)


def value_loss(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    assert scores.values is not None
    mask = rows.inputs().loss_mask
    error = torch.where(mask, scores.values - 1.0, 0.0).square().sum()
    return error / counts.tokens.sum(), {"loss": (error.detach(), mask.sum())}


def gradients(engine: TorchEngine) -> dict[str, Tensor]:
    """Every gradient, whole, as a copy. Collective."""
    return {name: gradient.clone() for name, gradient in engine.gradients()}


def weights(engine: TorchEngine) -> dict[str, Tensor]:
    """Every weight, whole, as a copy. Collective."""
    return {name: weight.clone() for name, weight in engine.weights()}


def deviation(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Law Layout: the largest max|Δ| / max(max|x|, RMS of all tensors together) over tensors x of `theirs`."""
    assert ours.keys() == theirs.keys()
    wide = {name: tensor.detach().double() for name, tensor in theirs.items()}
    rms = float(torch.cat([x.flatten() for x in wide.values()]).square().mean().sqrt())
    return max(float((ours[n].double() - x).abs().max()) / max(float(x.abs().max()), rms) for n, x in wide.items())
