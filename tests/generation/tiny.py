"""A model small enough for every test, with logits peaked enough that wrong ones show."""

import torch
from torch import Tensor

from framework.core.records import PromptBatch, ReadBox, whole
from framework.generation.config import GenerationConfig
from framework.generation.native import NativeGenerator
from framework.models.config import ModelConfig
from framework.models.init import fill, parameter_shapes, random_weights
from framework.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64, init_std=0.3
)
STOP = 7


def read_weights(config: ModelConfig = CONFIG, seed: int = 0) -> ReadBox:
    return random_weights(config, seed)


def pairs(config: ModelConfig = CONFIG, seed: int = 0) -> list[tuple[str, Tensor]]:
    read = read_weights(config, seed)
    return [(name, read(name, whole(shape))) for name, shape in parameter_shapes(config).items()]


def generator(
    strict: bool = True, slots: int = 4, stop: tuple[int, ...] = (STOP,), config: ModelConfig = CONFIG, seed: int = 0
) -> NativeGenerator:
    made = NativeGenerator(config, GenerationConfig(slots=slots, strict=strict), stop, "cpu")
    made.load(pairs(config, seed), version=3)
    return made


def model(strict: bool = False, config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    with torch.device("meta"):
        empty = Transformer(config, strict)
    return fill(empty, read_weights(config, seed))


def prompts(count: int = 8, longest: int = 9, seed: int = 0, first_row: int = 40) -> PromptBatch:
    """Prompts of 1 to `longest` tokens, padded with a token that is no padding id anywhere."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw)
    mask = torch.arange(longest) < lengths[:, None]
    tokens = torch.randint(0, CONFIG.vocab_size, (count, longest), generator=draw)
    return PromptBatch(tokens=torch.where(mask, tokens, 13), token_mask=mask, row=torch.arange(count) + first_row)
