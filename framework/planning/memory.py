"""How many bytes a model's states take on one rank. Activations, buffers of the allocator and collectives are left out.

The arithmetic of ZeRO (Rajbhandari et al. 2020, section 3.1): per parameter a weight, a gradient and AdamW's two moments;
mixed precision adds an fp32 master copy of the weight.
"""

from dataclasses import dataclass

from framework.engine.config import Precision
from framework.models.config import Activation, ModelConfig, Norm, Position
from framework.parallel.config import ParallelConfig, Shard

_BYTES = {Precision.FP32: 4, Precision.BF16: 4, Precision.FP64: 8}


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank. Example: 1,000 fp32 parameters on one rank: weights 4,000, gradients 4,000, optimizer 8,000."""

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
    return embeddings + learned + model.num_layers * layer + norm


def state_memory(parameters: int, precision: Precision, parallel: ParallelConfig, data_size: int) -> StateMemory:
    """Bytes of weights (with the fp32 master where compute is bf16), gradients and AdamW moments on one rank."""
    share = data_size if parallel.shard is Shard.FULL else 1
    per_rank = -(-parameters // share)
    size = _BYTES[precision]
    return StateMemory(weights=per_rank * size, gradients=per_rank * size, optimizer=2 * per_rank * size)


def _feed_forward(model: ModelConfig) -> int:
    gated = model.activation is Activation.SWIGLU
    inner, hidden = model.feed_forward_size, model.hidden_size
    up = inner * (2 if gated else 1)
    return hidden * up + inner * hidden + int(model.mlp_bias) * (up + hidden)
