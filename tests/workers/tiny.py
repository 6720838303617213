"""A tiny policy and reward model in folders, and rollouts from them, for the tests of workers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from framework.core.records import Experience, PromptBatch, Rollout, whole
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import parameter_shapes, random_weights
from framework.optim.config import OptimConfig, Schedule
from framework.workers.config import EngineSpec, PpoConfig

MODEL = ModelConfig(vocab_size=29, hidden_size=16, num_layers=2, num_heads=2, max_positions=32)
OPTIM = OptimConfig(lr=1e-2, eps=1e-5, schedule=Schedule.CONSTANT, warmup=0, weight_decay=0.0)
TEMPERATURE = 0.7
WIDTH = 16
END = 1


def policy_folder(folder: Path, seed: int = 3) -> str:
    """Random weights of a fair size, so that log-probs are far from uniform."""
    read = random_weights(replace(MODEL, init_std=0.3), seed)
    save_weights(MODEL, ((name, read(name, whole(s))) for name, s in parameter_shapes(MODEL).items()), folder)
    return str(folder)


def reward_folder(folder: Path, seed: int = 5, extra: dict[str, Any] | None = None) -> str:
    read = random_weights(replace(MODEL, init_std=0.3), seed)
    weights = [(name, read(name, whole(s))) for name, s in parameter_shapes(MODEL).items()]
    head = "class_head.weight"
    save_weights(MODEL, [*weights, (head, read(head, whole((1, 16))))], folder, classes=1, extra=extra)
    return str(folder)


def spec(folder: str, **changes: Any) -> EngineSpec:
    given = {"micro_size": 4, "engine": EngineConfig(strict=True), "temperature": TEMPERATURE, "optim": OPTIM}
    return EngineSpec(folder, **(given | changes))


def generator_kwargs(folder: str, **changes: Any) -> dict[str, Any]:
    given = {
        "folder": folder,
        "sampling": SamplingConfig(max_tokens=8, temperature=TEMPERATURE),
        "generation": GenerationConfig(slots=3, strict=True),
        "stop_ids": (END,),
        "width": WIDTH,
    }
    return given | changes


def prompts(rows: int = 4) -> PromptBatch:
    """Of 3, 4, 5, 3, ... tokens."""
    lengths = torch.tensor([3 + r % 3 for r in range(rows)])
    mask = torch.arange(5) < lengths[:, None]
    tokens = torch.where(mask, (torch.arange(rows * 5).reshape(rows, 5) * 7) % 27 + 2, 0)
    return PromptBatch(tokens, mask, torch.arange(rows))


def experience(rollout: Rollout, old_log_probs: torch.Tensor, values: torch.Tensor | None = None) -> Experience:
    """Advantages that differ from row to row and token to token; everything zero outside the response."""
    mask = rollout.response_mask
    rows, width = mask.shape
    wave = torch.sin(torch.arange(rows * width).reshape(rows, width).float()) * mask
    values = torch.zeros_like(old_log_probs) if values is None else values
    return Experience(rollout, old_log_probs, old_log_probs, values, wave, wave, (wave + 1) * mask)


PLACE = Runtime(deterministic=True)
PPO = PpoConfig(entropy_coefficient=0.01)
