"""What is measured: Llamas of the sizes that the field compares, by the presets' names, and their random weights."""

import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from framework.core.records import Box, whole
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import head_shapes, parameter_shapes
from framework.models.presets import preset

# GPT-2's vocabulary filled up to a multiple of 64; Llama 2's, with which 22 layers of width 2048 have 1.1e9 parameters.
VOCABULARY = {"124m": 50304, "350m": 50304, "1b": 32000, "tiny": 256}
_STD = 0.02


def llama(name: str) -> ModelConfig:
    """The preset of that name, with a vocabulary."""
    return replace(preset(name), vocab_size=VOCABULARY[name])


def noise(name: str, box: Box) -> Tensor:
    """A ReadBox of whole tensors. Not law Init's: torch's own numbers come ten times as fast, and while a billion
    are drawn a card waits."""
    shape = [length for _, length in box]
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.empty(shape).normal_(0, _STD, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def write(model: ModelConfig, folder: Path, classes: int = 0) -> Path:
    """Noise in a folder, which all sides load; with `classes` a reward model's. Returns the folder."""
    shapes = parameter_shapes(model) | (head_shapes(model, classes) if classes else {})
    save_weights(model, ((name, noise(name, whole(shape))) for name, shape in shapes.items()), folder, classes=classes)
    return folder
