"""Which parameters of a model a recipe lets learn."""

from math import prod

from framework.models.config import ModelConfig
from framework.models.frozen import frozen_names
from framework.models.init import parameter_shapes
from framework.models.lora import lora_shapes, still
from framework.stages.config import TrainingRun


def frozen_of(config: TrainingRun, model: ModelConfig) -> frozenset[str]:
    """The model's parameters that do not learn under this recipe."""
    if config.lora.rank:
        return still(model, config.lora)
    train = config.train
    return frozen_names(parameter_shapes(model), train.freeze, train.last_layers, model.num_layers)


def num_learning(config: TrainingRun, model: ModelConfig) -> tuple[int, int]:
    """(elements that learn, all), an adapter's with them; new heads not counted."""
    shapes = parameter_shapes(model) | (lora_shapes(model, config.lora) if config.lora.rank else {})
    frozen, everything = frozen_of(config, model), sum(map(prod, shapes.values()))
    return everything - sum(prod(shapes[name]) for name in frozen), everything
