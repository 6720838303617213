"""Which parameters are decayed."""

from collections.abc import Sequence


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Weight decay is for matrices that multiply: not for norms, biases and embeddings (a tied head is its embedding).

    `name` is logical, "layers.0.mlp.up.weight"; `shape` the whole tensor's.
    """
    is_embedding = "embedding" in name.split(".")[0]
    return len(shape) >= 2 and not is_embedding
