"""Which parameters are decayed."""

from collections.abc import Sequence


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Weight decay is for matrices that multiply: not for norms, biases and tables (embeddings, a tied head with them,
    and relative positions).

    `name` is logical, "layers.0.mlp.up.weight"; `shape` the whole tensor's.
    """
    parts = name.split(".")
    return len(shape) >= 2 and "embedding" not in parts[0] and "relative" not in parts
