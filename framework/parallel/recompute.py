"""Activations that backward computes again instead of keeping (Chen et al. 2016; Korthikanti et al. 2022).

full        a block keeps its input alone: one more forward, the least memory
selective   a block keeps what its weights and its attention gave and computes the rest again: norms, activations,
            rotations; scores too where they stand in memory (the ring, strict mode), for they outweigh all else
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from framework.parallel.config import Recompute

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_KEPT_BY_NAME = {  # known once the library that has them is imported
    "torch_attn._varlen_attn.default",
    "flash_attn._flash_attn_forward.default",
    "flash_attn._flash_attn_varlen_forward.default",
    "flash_attn_3._flash_attn_forward.default",
}


def recompute(block: nn.Module, how: Recompute) -> None:
    """Let backward compute `block` again, in place. What a block draws is a function of counters that stand still until
    backward is done, so no generator is restored."""
    if how is Recompute.NONE:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how is Recompute.SELECTIVE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
    block.forward = partial(checkpoint, block.forward, **options)


def _kept(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT or str(op) in _KEPT_BY_NAME
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
