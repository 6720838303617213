"""Small models whose every parameter is random, norms and biases included, at a scale where each one matters."""

import torch
from torch import Tensor

from framework.models.config import ModelConfig
from framework.models.transformer import Transformer

TINY = ModelConfig(vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40)


def drawn(
    config: ModelConfig = TINY, strict: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Transformer:
    """A model with logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(config, strict)
    model = model.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 2:
                noise *= parameter.shape[1] ** -0.5
            else:
                noise = 0.3 * noise + (1 if name.endswith("norm.weight") else 0)
            parameter.copy_(noise)
    return model


def tokens(rows: int, length: int, vocabulary: int = 37, seed: int = 1) -> Tensor:
    """[rows, length] random ids."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions(rows: int, length: int) -> Tensor:
    """[rows, length]: 0, 1, ... in each row."""
    return torch.arange(length).expand(rows, -1)
