"""Initial values (law Init): each a pure function of (seed, parameter name, element index), any box drawn on its own.

Weights are Normal(0, init_std), the two projections back into the residual stream scaled by 1/sqrt(2 num_layers)
(GPT-2, Radford et al. 2019); with DeepNorm these, the values and the feed-forward by (8 num_layers)^(-1/4) (Wang et al.
2022); an expert is a feed-forward block. Norms one, biases zero. A class head is Normal(0, 1/sqrt(D+1)) (Stiennon et
al. 2020), a value head zero: the first values are 0, not noise.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.core import random
from framework.core.errors import UsageError, nearest
from framework.core.records import Box, ReadBox, whole
from framework.models.config import Architecture, ModelConfig, NormPlace
from framework.models.transformer import Transformer

_DRAWN_AT_ONCE = 1 << 18  # elements; the integers of the generator then stay in the cache


def random_weights(config: ModelConfig, seed: int) -> ReadBox:
    """A source of fp32 weights for every name of the Transformer, and for those of heads for values and classes."""
    shapes = {**parameter_shapes(config), **head_shapes(config, 1), "value_head.weight": (1, config.hidden_size)}

    def read(name: str, box: Box) -> Tensor:
        if name not in shapes:
            raise UsageError(f"this model has no parameter '{name}': {nearest(name, shapes)}")
        return draw(name, box, shapes[name], _deviation(name, config), seed)

    return read


@functools.cache
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the Transformer, in its order; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def head_shapes(config: ModelConfig, classes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a head for `classes`, which an encoder's first state reaches through a pooler."""
    size = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"class_head.weight": (classes, size)}
    if config.architecture is Architecture.ENCODER:
        shapes |= {"class_head.bias": (classes,), "pooler.weight": (size, size), "pooler.bias": (size,)}
    return shapes


def fill(
    model: Transformer, read: ReadBox, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Give a model built on the meta device its weights, one tensor at a time, in the source's dtype unless told."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = read(name, whole(parameter.shape)).to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))
    return model


def _deviation(name: str, config: ModelConfig) -> float | None:
    """The standard deviation of a drawn parameter, or None for one that is filled with a constant."""
    module = name.rpartition(".")[0]
    if name.endswith(".bias") or module.endswith("norm") or module == "value_head":
        return None
    if module == "class_head":
        return (config.hidden_size + 1) ** -0.5
    if config.norm_place is NormPlace.DEEP:
        shrinks = module.endswith(("attention.v", "attention.o", ".gate", ".up", ".down"))
        return config.init_std * (8 * config.num_layers) ** -0.25 if shrinks else config.init_std
    back_into_residual = module.endswith(
        ("attention.o", "cross.o", ".down")
    )  # of the block, of experts, of the shared one
    return config.init_std * (2 * config.num_layers) ** -0.5 if back_into_residual else config.init_std


def draw(name: str, box: Box, whole_shape: Sequence[int], deviation: float | None, seed: int) -> Tensor:
    """The box of a parameter of `whole_shape`: Normal(0, deviation), or its constant where that is None."""
    shape = [length for _, length in box]
    if deviation is None:
        is_norm_weight = name.endswith("norm.weight")
        return torch.full(shape, 1.0 if is_norm_weight else 0.0)
    key, (column, width) = random.key(seed, name), box[-1]
    rows = _row_numbers(box, whole_shape)
    drawn = torch.empty(len(rows), width)
    at_once = max(1, _DRAWN_AT_ONCE // max(width, 1))
    for first in range(0, len(rows), at_once):
        numbers = rows[first : first + at_once].unsqueeze(1) * whole_shape[-1]
        index = numbers + torch.arange(column, column + width)
        drawn[first : first + at_once] = random.normal(key, index) * deviation
    return drawn.view(shape)


def _row_numbers(box: Box, whole_shape: Sequence[int]) -> Tensor:
    """Of the rows of a box, counted through all matrices of a stack: int64."""
    numbers = torch.zeros(1, dtype=torch.long)
    for (start, length), size in zip(box[:-1], whole_shape[:-1], strict=True):
        numbers = (numbers.unsqueeze(1) * size + torch.arange(start, start + length)).flatten()
    return numbers
