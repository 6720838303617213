"""What DeepSpeed is told. Its defaults would change the answer; every line here that could is met by a test.

Left out: the optimizer, which is ours, and the learning rate, which comes with every step.
"""

from typing import Any

import torch

from framework.engine.config import Precision
from framework.parallel.config import ParallelConfig

_BUCKET = 1 << 26  # elements reduced or gathered at once; DeepSpeed's own 5e8 would be 2 GB of fp32


def settings(
    parallel: ParallelConfig,
    precision: Precision,
    clip: float,
    elements: int,
    largest_vector: int,
    device: torch.device,
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. `elements`: of the whole model; parameters of at most
    `largest_vector` elements (norms, biases) are not worth a gather and stay on every rank under ZeRO-3."""
    return {
        # When to update is ours to say: micro-batches differ in number from step to step, and a loss is divided by
        # what it counts, never by how many micro-batches there were.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,  # ours
        "zero_force_ds_cpu_optimizer": False,
        # Of bf16 there is only the compute: gradients are reduced and added up in fp32, into fp32 masters.
        "bf16": {"enabled": precision is Precision.BF16, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 62,
        "zero_optimization": _zero(parallel, elements, largest_vector, device),
    }


def _zero(parallel: ParallelConfig, elements: int, largest_vector: int, device: torch.device) -> dict[str, Any]:
    bucket = min(_BUCKET, elements + elements % 2)
    zero: dict[str, Any] = {
        "stage": parallel.zero,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "memory_efficient_linear": False,  # it would put another F.linear in place of torch's, for the whole process
    }
    if parallel.zero == 3:
        zero |= {"stage3_param_persistence_threshold": largest_vector}
    if parallel.offload:
        place = {"device": "cpu", "pin_memory": device.type == "cuda"}
        zero |= {"offload_optimizer": dict(place), "offload_param": dict(place)}
    return zero
