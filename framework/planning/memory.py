"""How many bytes a model's states take on one rank. Activations, buffers of the allocator and collectives are left out.

The arithmetic of ZeRO (Rajbhandari et al. 2020, section 3.1): a parameter is a weight, a gradient, two AdamW moments;
mixed precision adds an fp32 master copy of the weight.
"""

from dataclasses import dataclass

from framework.models.config import Activation, ModelConfig, Norm, NormPlace, Position


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank. Example: 1,000 fp32 parameters: weights 4,000, gradients 4,000, optimizer 8,000."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def num_parameters(model: ModelConfig) -> int:
    """Exact number of parameters of the transformer (heads for values or classes not counted)."""
    hidden, bias = model.hidden_size, int(model.attention_bias)
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    attention = hidden * (queries + 2 * keys) + queries * hidden + bias * (queries + 2 * keys + hidden)
    norm = hidden * (2 if model.norm is Norm.LAYER else 1)
    layer = attention + _feed_forward(model) + 2 * norm
    embeddings = model.vocab_size * hidden * (1 if model.tied else 2)
    learned = model.max_positions * hidden if model.position is Position.LEARNED else 0
    last = norm if model.norm_place is NormPlace.PRE else 0
    return embeddings + learned + model.num_layers * layer + last


def state_memory(parameters: int, element_bytes: int, num_shards: int) -> StateMemory:
    """Bytes of master weights, gradients and AdamW's two moments on one of `num_shards` ranks that share them out, each
    element of `element_bytes` (4, also where compute is bf16: its master copies are fp32)."""
    size = -(-parameters // num_shards) * element_bytes
    return StateMemory(weights=size, gradients=size, optimizer=2 * size)


def _feed_forward(model: ModelConfig) -> int:
    gated = model.activation is Activation.SWIGLU
    inner, hidden = model.feed_forward_size, model.hidden_size
    up = inner * (2 if gated else 1)
    return hidden * up + inner * hidden + int(model.mlp_bias) * (up + hidden)
