"""Small models whose every parameter is random, norms and biases included, at a scale where each one matters."""

from dataclasses import replace

import torch
from torch import Tensor

from framework.models.config import Activation, Bias, ModelConfig, MoeConfig, Norm, NormPlace, Position
from framework.models.transformer import Transformer

TINY = ModelConfig(vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40)

LATER_AXES = {
    "alibi, norm of the embedding": replace(
        TINY, position=Position.ALIBI, norm=Norm.LAYER, embedding_norm=True, num_heads=4
    ),
    "window, norms of q and k": replace(TINY, window=4, window_from=1, qk_norm=True, attention_bias=Bias.QKV),
    "sandwich, half of each head turned": replace(
        TINY, norm_place=NormPlace.SANDWICH, head_dim=16, rope_fraction=0.5, rope_interleaved=True
    ),
    "deep, geglu, window with alibi": replace(
        TINY, norm_place=NormPlace.DEEP, activation=Activation.GEGLU, position=Position.ALIBI, window=4
    ),
    "sinusoidal, capped scores": replace(TINY, position=Position.SINUSOIDAL, score_cap=1.0),
    "relative, unscaled": replace(
        TINY, position=Position.RELATIVE, relative_buckets=8, relative_distance=9, scaled_scores=False
    ),
    "geglu by tanh": replace(TINY, activation=Activation.GEGLU_TANH),
    "experts, the last layer's": replace(
        TINY, moe=MoeConfig(experts=5, top_k=3, intermediate_size=24, first=1, shared=16, shared_gate=True)
    ),
}


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
            if parameter.dim() >= 2:
                noise *= parameter.shape[-1] ** -0.5
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
