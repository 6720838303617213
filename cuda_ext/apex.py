"""NVIDIA apex, where it is installed: its fused norms and AdamW in the words of our operators.

The package `apex` on PyPI is another program. What is said of apex here was read off its source (at 014f30f7 and
004da4ed) and has not run against it. Importing this needs no torch. Left out: apex's own optimizer, which owns what it
updates, and its norms that keep the output in place of the input.
"""

import functools
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cuda_ext.implementation import Implementation

if TYPE_CHECKING:
    from torch import Tensor

RUNS = {kind: Implementation("NVIDIA apex", f"ops.{kind}=apex") for kind in ("norm", "optimizer")}
_NEEDED = {"norm": ("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm"), "optimizer": ("amp_C",)}
CHUNK = 1 << 16  # elements a block, as apex's own optimizers choose
_MOST = 1 << 31  # elements of a tensor: apex counts them in 32 bits
_ADAM_W, _CORRECTED = 1, 1  # decoupled decay; divided by 1 - beta^t
_FORM = Implementation("reference", f"apex takes fp32, bf16 and fp16 on a GPU, fewer than {_MOST} elements a tensor")


@functools.cache
def why_not(kind: str) -> str:
    """Why `kind`, norm or optimizer, cannot be NVIDIA apex's in this installation; "" if it can."""
    found = find_spec("apex")
    if found is None:
        return "NVIDIA apex is not installed here (the package `apex` on PyPI is another program)"
    places = list(found.submodule_search_locations or ())
    if not any(Path(place, "multi_tensor_apply").is_dir() for place in places):
        return f"the apex in {', '.join(places)} is not NVIDIA's but the package of that name on PyPI, another program"
    for name in _NEEDED[kind]:
        try:
            import torch  # noqa: F401  apex's libraries want torch's to be there

            importlib.import_module(name)
        except Exception as error:  # whatever a library built for another torch says when it is opened
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f"NVIDIA apex is here, but its {name} cannot be used ({reason}); build it with its CUDA extensions"
    return ""


def choice(kind: str, tensors: "tuple[Tensor, ...]") -> Implementation:
    """Apex, or what runs because apex is not here or cannot take these."""
    if absent := _absent(kind):
        return absent
    fits = (on_gpu(x) and x.is_floating_point() and x.element_size() in (2, 4) and x.numel() < _MOST for x in tensors)
    return RUNS[kind] if all(fits) else _FORM


def on_gpu(tensor: "Tensor") -> bool:
    """Where apex's kernels run."""
    return tensor.device.type == "cuda"


def rms_norm(x: "Tensor", weight: "Tensor", eps: float) -> "Tensor":
    """x[..., D], weight[D] -> y[..., D], as `rms_norm.reference`."""
    return _norm("rms_norm", x, (weight,), eps)


def layer_norm(x: "Tensor", weight: "Tensor", bias: "Tensor | None", eps: float) -> "Tensor":
    """x[..., D], weight and bias[D] -> y[..., D], as `layer_norm.reference`."""
    import torch

    return _norm("layer_norm", x, (weight, torch.zeros_like(weight) if bias is None else bias), eps)


def adamw(
    params: "list[Tensor]",
    grads: "list[Tensor]",
    exp_avgs: "list[Tensor]",
    exp_avg_sqs: "list[Tensor]",
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unscale: float = 1.0,
    clip: "Tensor | None" = None,
    non_finite: "Tensor | None" = None,
    copies: "list[Tensor] | None" = None,
) -> None:
    """As `adamw.reference`, but for fp32's rounding: apex adds the decay to the update, and takes 1 - beta in fp32.

    Its plain kernel takes no factor and skips nothing. A step with either takes the other one, which reads both on the
    device and writes gradients: it is given copies.
    """
    import amp_C
    import torch

    held = [i for i, param in enumerate(params) if param.numel()]  # what comes last must have a block, or none starts
    if not held:
        return
    lists = [[tensors[i] for i in held] for tensors in (grads, params, exp_avgs, exp_avg_sqs)]
    first, settings, plain = lists[1][0], (beta1, beta2, eps), unscale == 1 and clip is None and non_finite is None
    dense = torch.contiguous_format  # all four are read as of one dtype, in order
    lists[0] = [grad.to(torch.float32, copy=not plain, memory_format=dense) for grad in lists[0]]
    if plain:
        noop = torch.zeros(1, dtype=torch.int32, device=first.device)
        amp_C.multi_tensor_adam(CHUNK, noop, lists, lr, *settings, step, _ADAM_W, _CORRECTED, weight_decay)
    else:
        one = torch.ones(1, device=first.device)
        skipped = (one * 0 if non_finite is None else (non_finite.reshape(1) != 0)).int()
        factor = one * unscale if clip is None else clip.float().reshape(1) * unscale
        number = torch.full((1,), step, dtype=torch.int32, device=first.device)
        amp_C.multi_tensor_adam_capturable(
            CHUNK, skipped, lists, one * lr, *settings, number, _ADAM_W, _CORRECTED, weight_decay, factor
        )
    for param, copy in zip(params, copies or [], strict=bool(copies)):
        kept = param.to(copy.dtype)
        copy.copy_(kept if non_finite is None else torch.where(non_finite.reshape(()) != 0, copy, kept))


def _norm(name: str, x: "Tensor", affine: "tuple[Tensor, ...]", eps: float) -> "Tensor":
    """Outside of autocast, which apex would follow into fewer bits; all in the widest dtype, so that there is one
    rounding, at the end: apex's own mixed form takes only fp32 rows with narrower parameters."""
    import torch

    call = getattr(importlib.import_module("apex.normalization.fused_layer_norm"), f"fused_{name}_affine")
    wide = torch.promote_types(x.dtype, affine[0].dtype)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = call(x.to(wide), *(part.to(wide) for part in affine), affine[0].shape, eps)
    return y.to(x.dtype)


_said: dict[str, Implementation] = {}


def _absent(kind: str) -> Implementation | None:
    reason = why_not(kind)
    return _said.setdefault(kind, Implementation("reference", reason)) if reason else None


_absent._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result, before torch is here
